"""AirCache (arXiv 2503.23956): visual keys judged by the few text tokens that matter; layers share by what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import over_heads, span
from tokenreduce.algorithms.keys import check_finite, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.algorithms.shares import allot, total_of
from tokenreduce.core.budget import check_keep, check_share
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["AirCache"]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer: what visual keys are worth, (B*Hkv,N), their sum and their skew, (B,) double each."""

    evidence: CacheEvidence
    scores: Tensor
    strength: Tensor
    skew: Tensor


@dataclass(frozen=True)
class AirCache(CacheReducer, name="aircache", needs=("attention",), paper="2503.23956", title="AirCache"):
    """AirCache: behind the last layer's prefill, share the visual budget over layers; all text stays.

    In each layer, the elite window is the text with at least ``alpha`` times the largest attention of the last text
    token, over text only, averaged over query heads. The attention of the elite queries, over visual and elite keys
    only, averaged over them and over the query heads of a KV head, is what a visual key is worth there. Strength is the
    sum of these worths and skew their sample skewness, both of the mean over heads, skew at least 0. A layer gets the
    mean of the two, each divided by its mean over layers, times the budget; at least one key and at most all, integers
    by largest remainder, so that all layers together keep ``keep * visual keys * layers``. Each KV head keeps its best.
    Nothing is evicted in decode, and peak memory does not fall.

    Args:
        keep: visual keys of every KV head that stay, on average over layers: a ratio or a count.
        alpha: how near to the largest attention elite text is, in [0, 1].
        skip_first: whether the first token, which is a sink in many layers and then is the whole window, stays out
            (not in the paper).

    There is no code, and the paper leaves open what is decided here: elite text in front of the image, which sees none
    of it, is left out of the window, which is the last token where nothing else is in it; heads are averaged behind the
    softmax; several images are one pool. Where skew (fewer than 3 visual keys, equal worths) or strength is 0 in every
    layer, it speaks for equal shares.

    Raises ``ValueError`` for numbers out of range.
    """

    keep: int | float = 0.1
    alpha: float = 0.9
    skip_first: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share(self.alpha, "alpha")

    def moment(self) -> str:
        return "prompt"

    def summary(self, evidence: CacheEvidence) -> _Layer:
        visual = evidence.visual
        elite = self._elite(evidence)
        among, rows = visual | elite, span(elite, evidence)
        chosen = elite[:, evidence.n - rows :].float()
        scores = torch.zeros(visual.shape, device=visual.device)
        for start, block in evidence.blocks(rows):
            block = block * among[:, None, None]
            block = block / block.sum(-1, keepdim=True).clamp(min=torch.finfo(block.dtype).tiny)
            mine = chosen[:, start : start + block.shape[2]]
            scores += (block * mine[:, None, :, None]).sum(2).mean(1)
        scores = (scores / chosen.sum(1, keepdim=True).clamp(min=1)).masked_fill(~visual, 0.0)
        check_finite(scores, visual)
        worth = evidence.unfold(over_heads(scores, evidence))[:, 0].double()
        return _Layer(evidence.bare(), scores, worth.sum(1), _skew(worth, evidence.unfold(visual)[:, 0]))

    def _elite(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N) bool: the text whose queries judge."""
        there, visual = evidence.there, evidence.visual
        text = there & ~visual
        last = text & (text.long().flip(1).cumsum(1).flip(1) == 1)
        rows = span(last, evidence)
        row = torch.zeros(visual.shape, device=visual.device)
        for start, block in evidence.blocks(rows):
            mine = last[:, evidence.n - rows + start :][:, : block.shape[2]].float()
            block = (block * mine[:, None, :, None]).sum(2) * text[:, None]
            row += (block / block.sum(-1, keepdim=True).clamp(min=torch.finfo(block.dtype).tiny)).mean(1)
        if self.skip_first:
            text = text & ~evidence.first(1)
        row = over_heads(row, evidence).masked_fill(~text, -1.0)
        elite = text & (row >= self.alpha * row.amax(1, keepdim=True)) & (visual.long().cumsum(1) > 0)
        elite[:, : evidence.n - evidence.rows_given] = False  # whose queries are not known
        return torch.where(elite.any(1, keepdim=True), elite, evidence.last(1))

    def decide(self, summaries: Sequence[_Layer]) -> list[Plan]:
        counts = torch.stack([s.evidence.unfold(s.evidence.visual)[:, 0].sum(1) for s in summaries], 1)
        shares = _level(torch.stack([s.strength for s in summaries], 1))
        shares = shares + _level(torch.stack([s.skew for s in summaries], 1).clamp(min=0))
        kept = allot(shares, total_of(self.keep, counts), counts.clamp(max=1), counts)
        plans = []
        for layer, wanted in zip(summaries, kept.unbind(1), strict=True):
            evidence, visual = layer.evidence, layer.evidence.visual
            stay = ~visual | best(layer.scores, visual, evidence.fold(wanted.unsqueeze(1)))
            plans.append(keep_slots(stay, evidence))
        return plans


def _level(values: Tensor) -> Tensor:
    """``values`` (B,L) divided by their mean over layers; 1 where all are 0."""
    mean = values.mean(1, keepdim=True)
    return torch.where(mean > 0, values / mean, 1.0)


def _skew(values: Tensor, among: Tensor) -> Tensor:
    """(B,) sample skewness of ``values`` (B,N) over those marked; 0 for fewer than 3, or equal ones."""
    n = among.sum(1).double()
    mean = (values * among).sum(1) / n.clamp(min=1)
    apart = (values - mean.unsqueeze(1)) * among
    deviation = (apart.square().sum(1) / (n - 1).clamp(min=1)).sqrt()
    cubes = apart.pow(3).sum(1) / deviation.pow(3)
    skew = n / ((n - 1) * (n - 2)).clamp(min=1) * cubes
    flat = deviation <= 1e-12 * mean.abs()
    return torch.where((n < 3) | flat, 0.0, skew)
