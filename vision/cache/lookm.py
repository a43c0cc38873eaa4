"""LOOK-M (arXiv 2406.18139): text stays, and visual keys that leave are merged into the ones most like them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.key_merge import check_merge, merge_slots, text_first
from tokenreduce.algorithms.keys import budget, check_finite, check_what
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_keep, check_share
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["LookM"]


@dataclass(frozen=True)
class LookM(CacheReducer, name="look-m", needs=("attention",), paper="2406.18139", title="LOOK-M"):
    """LOOK-M: behind each layer's prefill, keep text and the most attended visual keys, and merge the rest into them.

    A key's score is the attention of all queries of the prompt, summed, and averaged over the query heads of its KV
    head; early keys are seen by more queries, and win. Of N keys, the last ``recent_ratio * N`` stay, and the
    ``hh_ratio * N`` best of the others, text first. Every pair that leaves goes to the kept key of its head with the
    highest cosine, see :func:`~tokenreduce.algorithms.key_merge.merge_slots`. A merged slot weighs as one in attention.
    Samples without an image are left alone. Nothing is evicted in decode.

    Args:
        keep: visual keys of every KV head that stay beside all text; with ``what="all"`` all keys, half of them the
            last and half the best.
        what: "visual", or "all" as published.
        hh_ratio, recent_ratio: with ``what="all"``, the two shares instead of half of ``keep`` each; rounded down.
        text: with ``what="all"``: "keep" keeps all text, also beyond the budget (the official code), "budget" counts it
            inside, so that text goes when it overflows (the paper, where text gets the largest score added).
        merge: "pivot", "average", "weighted" or "none". Weighted and average are the paper's formulas (the code pairs
            filtered indices with unfiltered keys in average).
        merge_keys: whether keys are merged like values; None for not where positions have several axes (M-RoPE), where
            that destroys answers.
        alike: drop what is least like any kept key instead of merging it (a filter of the official code in weighted).

    Raises ``ValueError`` for an unknown ``merge`` or ``text``, ratios outside [0, 1] or with ``what="visual"``.
    """

    keep: int | float = 0.2
    what: str = "visual"
    hh_ratio: float | None = None
    recent_ratio: float | None = None
    text: str = "keep"
    merge: str = "pivot"
    merge_keys: bool | None = None
    alike: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_merge(self.merge, self.text)
        for name in ("hh_ratio", "recent_ratio"):
            value = getattr(self, name)
            if value is not None:
                check_share(value, name)
                if self.what != "all":
                    raise ValueError(f"{name} is a share of all keys; give what=all with it, or keep instead")

    def merges_keys(self, evidence: CacheEvidence) -> bool:
        return super().merges_keys(evidence) if self.merge_keys is None else self.merge_keys

    def plan(self, evidence: CacheEvidence) -> Plan:
        scores = evidence.column_sums().mean(1)
        check_finite(scores, evidence.there)
        visual = evidence.visual
        if self.what == "visual":
            stay = ~visual | best(scores, visual, budget(self.keep, visual))
        else:
            important, recent = self._parts(evidence)
            stay = text_first(scores, evidence, important, recent, self.text)
            whole = (evidence.counts <= important + recent) | ~visual.any(1, keepdim=True)
            stay = stay | whole
        return merge_slots(stay, evidence, self.merge, alike=self.alike)

    def _parts(self, evidence: CacheEvidence) -> tuple[Tensor, Tensor]:
        """(B*Hkv,1) each: how many stay as the best, and as the last."""
        counts = evidence.counts
        wanted = budget(self.keep, evidence.there)
        recent = wanted // 2
        important = wanted - recent
        if self.recent_ratio is not None:
            recent = (self.recent_ratio * counts.double()).long()
        if self.hh_ratio is not None:
            important = (self.hh_ratio * counts.double()).long()
        return important, recent
