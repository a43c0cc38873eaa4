"""Methods of the cache stage: which keys and values of a layer stay, after the prompt and while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenreduce.core.evidence.cache import CacheEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["CacheReducer"]


@dataclass(frozen=True)
class CacheReducer(Reducer):
    """Base of the methods that evict, merge or select cached keys and values.

    ``plan`` gets a :class:`~tokenreduce.core.evidence.CacheEvidence` and returns a plan over its N slots with B*Hkv
    rows, kept slots ascending. The adapter gathers keys and values by it; positions and rotations stay.
    ``needs=("attention",)`` makes the evidence have the queries of the last :meth:`query_rows` tokens; keys and values
    are always there.
    """

    stage: ClassVar[str] = "cache"

    def plan(self, evidence: CacheEvidence) -> Plan:
        """Which slots stay, or become which; a pure function of the evidence. What a method of :meth:`moment` "prompt"
        does with one layer alone, unless it says otherwise."""
        return self.plans([evidence])[0]

    # -- when ------------------------------------------------------------------------------------------------------
    def moment(self) -> str:
        """When the prompt's cache is thinned: "layer", right behind each layer's prefill, so that peak memory falls;
        "prompt", behind the last layer, for methods that share a budget over layers; or "never", where only decode
        steps thin it."""
        return "layer"

    def every(self) -> int:
        """Decode steps from one plan to the next; 0 where nothing is decided in decode."""
        return 0

    def temporary(self) -> bool:
        """Whether a plan in decode holds for that step only and nothing leaves: the step's attention sees the slots
        that stay. The evidence then has the step's own query."""
        return False

    def query_rows(self) -> int | None:
        """How many of the prompt's last queries are looked at; None for all. In decode it is the step's own, or so many
        of the last steps' where :meth:`recent_queries` says so."""
        return None

    def recent_queries(self) -> int:
        """In decode: queries of how many last tokens are looked at."""
        return 1

    def check_model(self, model: str, layers: int, kv_heads: int) -> None:
        """Raise ``ValueError`` where the settings were made for another model than the one of class ``model`` with
        ``layers`` decoder layers of ``kv_heads`` KV heads each; asked when a model is patched."""

    # -- what is kept between ----------------------------------------------------------------------------------------
    def score(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,N) or (B*Hkv,N,S) running score after this step, for methods that keep one; the adapter gathers it by
        the plan, and ``evidence.scores`` has it in the next step, behind which new slots have 0. Asked before
        ``plan``, which gets evidence with ``scores`` as they were before this step."""
        return None

    def remember(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,M) numbers of every head that are of no slot (a query to compare with), for methods that keep some:
        ``evidence.memory`` has them in the next step. Asked when ``score`` is, at the prompt too, and like it with
        evidence of the step before."""
        return None

    def summary(self, evidence: CacheEvidence) -> Any:
        """What is kept of a layer until :meth:`decide`, for methods of :meth:`moment` "prompt"; the evidence itself
        unless a method says less. Column sums and a few numbers are little, queries are not."""
        return evidence

    def decide(self, summaries: Sequence[Any]) -> list[Plan]:
        """One plan for each layer, from all their summaries; by default each on its own."""
        return [self.plan(summary) for summary in summaries]

    def plans(self, evidences: Sequence[CacheEvidence]) -> list[Plan]:
        """One plan for each layer."""
        return self.decide([self.summary(evidence) for evidence in evidences])

    # -- merging and weighing ------------------------------------------------------------------------------------------
    def merges_keys(self, evidence: CacheEvidence) -> bool:
        """Whether a plan that merges does so for keys as well as values; else a kept key stays as it is. By default not
        where positions have several axes, since a mean of keys of different places has lost its place."""
        return not evidence.mrope

    def counts_merged(self) -> bool:
        """Whether a merged slot gets log of its size as bias in later attention."""
        return False
