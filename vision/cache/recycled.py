"""Recycled Attention (arXiv 2411.05787): steps between two full ones see what the last full one attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.keys import budget, check_finite, check_what, keep_slots, pooled
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["Recycled"]


@dataclass(frozen=True)
class Recycled(
    CacheReducer, name="recycled", needs=("attention",), paper="2411.05787", title="Recycled Attention (RefreshKV)"
):
    """Recycled Attention: every few decode steps see all keys, and the steps between see the keys that these chose.

    A full step (the last token of the prompt is one) ranks the keys by its own softmaxed attention, max-pooled over
    neighbouring slots, the largest of the query heads of a KV head counting. The K best, and every token that came
    since, are what the following steps see, in every KV head and layer by itself. Nothing leaves the cache: this saves
    attention, not memory.

    Args:
        keep: K, a count or a ratio; an eighth in the paper.
        what: "visual" counts visual keys, and all text is seen; "all" counts all keys of the prompt. Then a partial
            step sees K keys besides its own, as published: for each token that came since, the worst of the K is left
            out. A ratio of 1.0 sees everything.
        stride: decode steps from one full step to the next. The paper compares 5, 10 and 15; its first version went up
            to 50.
        threshold: at every ``stride``-th step, stay with the choice in layers where the query is like the one of the
            last full step: the cosine of their means over all query heads is larger than this. The paper takes 0.85
            for Llama 3.1 and 0.95 for Qwen2 with strides of 5 and 10. None makes the stride fixed.
        kernel_size: odd width of the max-pooling, 7 in the paper; 1 for none.
        group: "max" or "mean" over the query heads of a KV head; nearly equal in the paper, which takes "max".

    The paper's later version is called RefreshKV. Its code was never published; this follows its text. Decisions:
    queries are compared as they attend, rotated (the paper does not say); samples of a batch decide for themselves;
    tokens of a later turn are seen until the next full step ranks them, too.

    Raises ``ValueError`` for settings out of range, NaN, and decode steps without the running scores.
    """

    keep: int | float = 0.125
    what: str = "visual"
    stride: int = 10
    threshold: float | None = None
    kernel_size: int = 7
    group: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.stride, "stride", 1)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is an odd int >= 1, not {self.kernel_size!r}")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine in [-1, 1], or none for a fixed stride, not {self.threshold!r}")

    def temporary(self) -> bool:
        return True

    def query_rows(self) -> int:
        return 1

    def score(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,N,2): a slot's rank in the last full step, and 1 for slots that were there then."""
        full = self._full(evidence)
        if not bool(full.any()):
            return _scores(evidence)
        rows = _last_row(evidence)
        check_finite(rows.amax(1), evidence.there)
        worth = pooled(rows.amax(1) if self.group == "max" else rows.mean(1), self.kernel_size, "maxpool")
        now = torch.stack([worth, evidence.there.to(worth)], -1)
        return now if bool(full.all()) else torch.where(full.unsqueeze(-1), now, _scores(evidence))

    def remember(self, evidence: CacheEvidence) -> Tensor | None:
        """(B*Hkv,d): the mean query of the last full step; only where queries are compared."""
        if self.threshold is None:
            return None
        query = _mean_query(evidence)
        return torch.where(self._full(evidence), query, evidence.memory) if evidence.step else query

    def plan(self, evidence: CacheEvidence) -> Plan:
        full = self._full(evidence)
        if bool(full.all()) or (isinstance(self.keep, float) and self.keep == 1):
            return Identity.like(evidence.keys)
        scores = _scores(evidence)
        worth, old = scores[..., 0], scores[..., 1] > 0
        there = evidence.there
        new = there & ~old
        if self.what == "visual":
            among = evidence.visual & old
            wanted = budget(self.keep, among)
        else:
            among = there & old
            came = new.sum(1, keepdim=True)
            total = self._total(evidence, among)
            new = new & evidence.last(total + 1)
            wanted = (total - came + 1).clamp(min=0)
        stay = new if self.what == "all" else there & ~among
        return keep_slots(stay | best(worth, among, wanted) | (full & there), evidence)

    def _total(self, evidence: CacheEvidence, among: Tensor) -> Tensor:
        """(B*Hkv,1): K where all keys count, of those of the prompt."""
        if isinstance(self.keep, int):
            return torch.full_like(among[:, :1], self.keep, dtype=torch.long)
        prompt = among.sum(1, keepdim=True) if evidence.prompt_slots is None else evidence.prompt_slots
        return (self.keep * prompt.double() + 0.5).long().clamp(min=1)

    def _full(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,1) bool: whether this step sees everything."""
        due = torch.full_like(evidence.there[:, :1], evidence.step % self.stride == 0)
        if self.threshold is None or not evidence.step or evidence.step % self.stride:
            return due
        alike = F.cosine_similarity(_mean_query(evidence), evidence.memory, dim=1).unsqueeze(1) > self.threshold
        return due & ~alike


def _mean_query(evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,d) the last query, averaged over all query heads of a layer."""
    return evidence.fold(evidence.unfold(evidence.queries[:, :, -1].float()).mean((1, 2)))


def _last_row(evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,G,N) attention of the last token that is there."""
    rows, real = evidence.rows(), evidence.row_there()
    if not bool(real.any(1).all()):
        raise ValueError(
            "recycled ranks by the last token of a sample, whose query the evidence of a right-padded sample lacks; "
            "give more queries, or pad on the left"
        )
    last = (real.long().cumsum(1) * real).argmax(1)
    return rows[torch.arange(len(last), device=last.device), :, last]


def _scores(evidence: CacheEvidence) -> Tensor:
    if evidence.scores is None:
        raise ValueError("recycled looks at what the last full step attended to: give scores=method.score(...)")
    return evidence.scores
