"""TokenSelect (arXiv 2411.02886): a new token chooses the cached keys that it attends to, by a vote of all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.keys import budget, check_finite, check_what, keep_slots, pooled
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import BudgetError, check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["TokenSelect"]


@dataclass(frozen=True)
class TokenSelect(CacheReducer, name="tokenselect", needs=("attention",), paper="2411.02886", title="TokenSelect"):
    """TokenSelect: in every decode step and layer, attention sees the first, the last and the most voted-for keys.

    Each query head turns its products with the candidates into a softmax over them, and the sum over all query heads of
    a layer is a candidate's score; all heads see the same ``top_k``. Nothing leaves the cache: this saves attention,
    not memory. The prompt itself runs on everything (the paper chooses there, too, for every 512 queries).

    Args:
        keep: instead of ``top_k``: with ``what="visual"`` visual keys that are seen, a count or a ratio; with "all" all
            keys that are seen, the first and the last included.
        what: "visual" lets all text be seen, and visual keys alone are candidates; "all", as published, has every key
            but the first ``n_init`` and the last ``n_local`` (the new token among them) as candidates.
        n_init, n_local: with ``what="all"``, first and last keys that are always seen.
        top_k: candidates that are seen beside them.
        kernel_size: odd width of max-pooling over the votes of neighbouring slots, -1 for none.
        scale: factor on products of queries and keys before the softmax. The published code has none (1.0), which
            sharpens the vote about elevenfold; None is the model's own.
        threshold: cosine between a step's query (all heads as one vector) and that of the last choice from which on
            that choice holds, in (0, 1]; 0.9 in the paper. None chooses in every step, as the published code does,
            whose branch for it would fail. Behind the last choice, a key that leaves the last ``n_local`` is not seen.

    Query heads vote with the keys of their own KV head; the published kernel takes KV head h mod Hkv instead of
    h // G, so that grouped heads vote with foreign keys. Keys are compared and attended to as they are cached, at their
    original positions: the published code puts candidates at position 0 and renumbers what it gathers, which serves
    prompts beyond the model's length. A softcap of the model stays in the products.

    Raises ``ValueError`` for settings out of range, NaN, a ``keep`` of all keys below ``n_init`` and ``n_local``, and
    caches whose heads hold different tokens, since all heads share one choice.
    """

    keep: int | float | None = None
    what: str = "visual"
    n_init: int = 128
    n_local: int = 512
    top_k: int = 2048
    kernel_size: int = -1
    scale: float | None = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.n_init, "n_init")
        check_count(self.n_local, "n_local", 1)
        check_count(self.top_k, "top_k", 1)
        if self.kernel_size != -1 and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is an odd int >= 1, or -1 for no pooling, not {self.kernel_size!r}")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale is a number above 0, or none for the model's own, not {self.scale!r}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold is a cosine in (0, 1], or none to choose in every step, not {self.threshold!r}"
            )

    def moment(self) -> str:
        return "never"

    def temporary(self) -> bool:
        return True

    def query_rows(self) -> int:
        return 1

    def score(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,N): 1 for the last choice; only where it may be used again."""
        if self.threshold is None:
            return None
        if not evidence.step:
            return torch.zeros(evidence.keys.shape[:2], device=evidence.keys.device)
        among, wanted = self._candidates(evidence)
        fresh = self._fresh(evidence, among, wanted)
        old = torch.zeros(among.shape, device=among.device) if evidence.scores is None else evidence.scores
        return torch.where(fresh, best(self._votes(evidence, among), among, wanted).float(), old)

    def remember(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,G*d): the queries of the last choice; one 0 for each head before the first."""
        if self.threshold is None:
            return None
        if not evidence.step:
            return torch.zeros(evidence.keys.shape[0], 1, device=evidence.keys.device)
        query = evidence.queries[:, :, -1].float().flatten(1)
        before = evidence.memory.expand(-1, query.shape[1])
        return torch.where(self._fresh(evidence, *self._candidates(evidence)), query, before)

    def plan(self, evidence: CacheEvidence) -> Plan:
        if not evidence.step:
            return Identity.like(evidence.keys)
        among, wanted = self._candidates(evidence)
        choosing = wanted < among.sum(1, keepdim=True)
        if not bool(choosing.any()):
            return Identity.like(evidence.keys)
        if self.threshold is None:
            chosen = best(self._votes(evidence, among), among, wanted)
        else:
            scores = self.score(evidence)
            assert scores is not None
            chosen = among & (scores > 0)
        return keep_slots((evidence.there & ~among) | torch.where(choosing, chosen, among), evidence)

    def _candidates(self, evidence: CacheEvidence) -> tuple[Tensor, Tensor]:
        """(B*Hkv,N) bool of the candidates, and (B*Hkv,1) how many of them are seen."""
        there, one = evidence.unfold(evidence.there), evidence.unfold(evidence.columns)
        if not bool((there == there[:, :1]).all()) or not bool((one == one[:, :1]).all()):
            raise ValueError(
                "tokenselect shares one choice over all heads, whose caches hold different tokens; combine it with a "
                "method that keeps the same tokens in every head, or choose recycled"
            )
        if self.what == "visual":
            among = evidence.visual
            return among, budget(self.top_k if self.keep is None else self.keep, among)
        fixed = evidence.first(self.n_init) | evidence.last(self.n_local)
        among = evidence.there & ~fixed
        if self.keep is None:
            return among, budget(self.top_k, among)
        total = budget(self.keep, evidence.there)
        wanted, all_seen = total - fixed.sum(1, keepdim=True), total >= evidence.counts
        if bool(((wanted < 0) & ~all_seen).any()):
            raise BudgetError(
                f"the budget of {int(total.min())} keys is below n_init={self.n_init} and n_local={self.n_local}, "
                f"which are always seen; give a larger keep, or smaller ones"
            )
        return among, torch.where(all_seen, among.sum(1, keepdim=True), wanted)

    def _votes(self, evidence: CacheEvidence, among: Tensor) -> Tensor:
        """(B*Hkv,N): what the softmaxes of all query heads over the candidates sum up to, the same for all heads."""
        rows = evidence.rows_given
        if not rows:
            evidence.rows()
        products = evidence.logits(rows - 1, rows)[:, :, 0]
        check_finite(products.amax(1), among)
        if self.scale is not None:
            products = products / evidence.scale * self.scale
        shares = products.masked_fill(~among.unsqueeze(1), float("-inf")).softmax(-1)
        shares = shares.masked_fill(~among.unsqueeze(1), 0.0)
        votes = evidence.fold(evidence.unfold(shares).sum((1, 2)))
        return votes if self.kernel_size == -1 else pooled(votes, self.kernel_size, "maxpool")

    def _fresh(self, evidence: CacheEvidence, among: Tensor, wanted: Tensor) -> Tensor:
        """(B*Hkv,1) bool: where a choice is made anew."""
        assert self.threshold is not None
        choosing = wanted < among.sum(1, keepdim=True)
        query = evidence.queries[:, :, -1].float().flatten(1)
        before = evidence.memory.expand(-1, query.shape[1])
        query, before = (evidence.unfold(t).flatten(1) for t in (query, before))
        alike = F.cosine_similarity(query, before, dim=1).unsqueeze(1) >= self.threshold
        return choosing & ~evidence.fold(alike)
