"""EMS (arXiv 2412.08521): evict what neither the whole prompt nor its end attends to, then merge into what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.key_merging import merge_slots
from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.algorithms.keys import best_slots, candidates, check_rows, covered, pooled
from tokenreduce.algorithms.scoring import descending
from tokenreduce.algorithms.sequence import packed
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["EMS"]


@dataclass(frozen=True)
class EMS(KeyScorer, name="ems", needs=("attention",), paper="2412.08521", title="EMS"):
    """EMS, evict then merge: behind each layer's prefill, the best keys of every KV head stay, similar ones in the
    middle are merged into them, and the rest goes.

    1. Score: the attention of all queries to a key, divided by how many see it (global), and that of the last
       ``window_size`` queries, pooled as in SnapKV (local); both averaged over the query heads. The global one is
       scaled to the mean of the local one, and the larger of both counts.
    2. The keys with the largest scores, as many as the budget, stay and are the centres. Keys that are not needed to
       reach the share ``tau`` of all scores are irrelevant and go, so that heads with concentrated attention evict
       more.
    3. Every other key joins the centre with the largest cos(keys) * cos(values), negative ones counted as 0, or goes
       where that is below ``similarity`` (the paper's zero class). Values of a class become their mean by score.

    No code of the paper was found; the steps are known from its abstract and its public reviews. Uncertain, and decided
    here: division by visibility, pooling, the maximum, ``tau``, centres by score, ``similarity``, and weights. Nothing
    is merged while decoding.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`. The paper's cache is keep=256,what=all.
            With ``what="all"`` the last ``window_size`` tokens always stay, inside the budget; with ``what="visual"``
            visual keys are merged into visual ones alone.
        window_size: last tokens of the prompt that make the local score.
        kernel_size: odd width of its average pooling; ends count zeros.
        combine: "max" or "sum" of both scores.
        tau: share of all scores that is not irrelevant, in (0, 1]; 1 lets only keys without any go before merging.
        similarity: least similarity to join a centre, in [0, 1].
        weights: what a key weighs in the mean of its class: its "score", or all are "equal".
        merge_keys: whether keys are averaged, too; by default a centre keeps its own, since a mean of rotated keys of
            different positions is no key of either. Keys with positions of several axes (M-RoPE) are never averaged.
        prop_attn: whether later attention gets the log of how many keys a centre stands for as bias; not in the paper.

    Raises ``ValueError`` for values other than these, and in a forward for a budget below the window (``what="all"``)
    and prompts that are padded behind.
    """

    window_size: int = 32
    kernel_size: int = 5
    combine: Literal["max", "sum"] = "max"
    tau: float = 0.95
    similarity: float = 0.5
    weights: Literal["score", "equal"] = "score"
    merge_keys: bool = False
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.window_size, "window_size", 1)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is an odd int >= 1, not {self.kernel_size!r}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is a number in (0, 1], not {self.tau!r}")
        if not 0 <= self.similarity <= 1:
            raise ValueError(f"similarity is a number in [0, 1], not {self.similarity!r}")

    def merges_keys(self, evidence: CacheEvidence) -> bool:
        return self.merge_keys and not evidence.mrope

    def counts_merged(self) -> bool:
        return self.prop_attn

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.last(self.window_size) if self.what == "all" else None

    def importance(self, evidence: CacheEvidence) -> Tensor:
        check_rows(evidence, self.window_size)
        gone = ~evidence.there
        whole = (evidence.column_sums().mean(1) / evidence.readers().clamp(min=1)).masked_fill(gone, 0.0)
        local = evidence.column_sums(rows=self.window_size).mean(1).masked_fill(gone, 0.0)
        local = pooled(local, self.kernel_size, "avgpool").masked_fill(gone, 0.0)
        least = torch.finfo(torch.float32).tiny
        whole = whole * (local.sum(1, keepdim=True) / whole.sum(1, keepdim=True).clamp(min=least))
        return torch.maximum(whole, local) if self.combine == "max" else whole + local

    def plan(self, evidence: CacheEvidence) -> Plan:
        if covered(self.keep, evidence, self.what):
            return Identity.like(evidence.keys)
        scores, among = self.importance(evidence), candidates(evidence, self.what)
        stay = best_slots(scores, self.keep, evidence, what=self.what, always=self.always(evidence))
        joins = self._relevant(scores, among) & ~stay
        into = _nearest(evidence, joins, stay & among, self.similarity)
        if self.weights == "equal":
            return merge_slots(stay, into, evidence)
        return merge_slots(stay, into, evidence, scores.clamp(min=torch.finfo(torch.float32).tiny))

    def _relevant(self, scores: Tensor, among: Tensor) -> Tensor:
        """(B*Hkv,N) bool: the best of ``among`` that are needed to reach the share ``tau`` of all scores."""
        order = descending(scores.masked_fill(~among, -1.0))
        ranked = scores.masked_fill(~among, 0.0).double().gather(1, order)
        before = ranked.cumsum(1) - ranked
        needed = before < self.tau * ranked.sum(1, keepdim=True)
        return among & torch.zeros_like(among).scatter(1, order, needed)


def _nearest(evidence: CacheEvidence, joins: Tensor, centres: Tensor, least: float) -> Tensor:
    """(B*Hkv,N): the slot among ``centres`` that each slot in ``joins`` is most similar to, ties to the lower one; -1
    where none is as similar as ``least``, and for other slots."""
    (src, is_src), (dst, is_dst) = packed(joins), packed(centres)
    alike = None
    for x in (evidence.keys, evidence.values):
        unit = F.normalize(x.float(), dim=-1)
        wide = unit.shape[-1]
        some, other = (unit.gather(1, at.unsqueeze(-1).expand(-1, -1, wide)) for at in (src, dst))
        cosine = (some @ other.transpose(1, 2)).clamp(min=0.0)
        alike = cosine if alike is None else alike * cosine
    assert alike is not None
    alike = alike.masked_fill(~is_dst.unsqueeze(1), -1.0)
    top = alike.amax(-1, keepdim=True)
    columns = torch.arange(dst.shape[1], device=dst.device).expand_as(alike)
    nearest = torch.where(alike == top, columns, dst.shape[1]).amin(-1).clamp(max=dst.shape[1] - 1)
    found = torch.where(is_src & (top.squeeze(-1) >= least), dst.gather(1, nearest), -1)
    out = torch.full(joins.shape, -1, dtype=torch.long, device=joins.device)
    return torch.where(joins, out.scatter(1, src, found), -1)
