"""Base of methods that rank cached keys by one number each and keep the best."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.keys import check_what, keep_best_slots
from tokenreduce.core.budget import Keep, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["KeyScorer"]


@dataclass(frozen=True)
class KeyScorer(CacheReducer):
    """A method says what a key is worth (:meth:`importance`) and which stay whatever they are worth (:meth:`always`).

    Wrappers that share a budget over heads or layers ask for both.

    Args:
        keep: keys of every KV head that stay of those that ``what`` counts, a count or a ratio, rounded half up.
        what: "visual" counts visual keys, and all text stays; "all" lets text compete, too.
    """

    keep: int | float = 0.25
    what: str = "visual"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)

    def importance(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N): what every key is worth; larger ones stay."""
        raise NotImplementedError("abstract")

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,N) bool: keys that stay whatever they are worth, inside the budget; None for none."""
        return None

    def mass(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N): by what heads share a budget, on one scale for all of them; what a key is worth, unless that mixes
        in terms of another kind."""
        return self.importance(evidence)

    def wanted(self, evidence: CacheEvidence) -> Keep | Tensor:
        """How many keys stay of those that the budget counts: a count, a ratio, or a number for every head (B*Hkv,1).
        Methods with a schedule over layers say so here, where wrappers ask, too."""
        return self.keep

    def plan(self, evidence: CacheEvidence) -> Plan:
        return keep_best_slots(
            self.importance(evidence), self.wanted(evidence), evidence, what=self.what, always=self.always(evidence)
        )
