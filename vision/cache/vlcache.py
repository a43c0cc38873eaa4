"""VL-Cache (arXiv 2410.23317): layers whose attention is dense keep more keys, ranked by the text behind the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import over_heads, span
from tokenreduce.algorithms.keys import candidates, check_finite, check_what, keep_slots
from tokenreduce.algorithms.sequence import best, question
from tokenreduce.core.budget import check_keep, check_share
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["VLCache"]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer: what its keys are worth, (B*Hkv,N), and its density, (B,) double."""

    evidence: CacheEvidence
    scores: Tensor
    density: Tensor


@dataclass(frozen=True)
class VLCache(CacheReducer, name="vl-cache", needs=("attention",), paper="2410.23317", title="VL-Cache"):
    """VL-Cache: behind the last layer's prefill, share one budget over the layers by how dense their attention is.

    Only the queries of the text behind the last visual token judge; where there is none, the last token does. An entry
    of their causal rows counts as alive from ``threshold`` times the largest of its row. A layer's density d is the
    share of entries that are alive, averaged over query heads. With budget share a, layer l gets the share
    b = clip(d_l / sum d * 0.9 a L) of its keys, at least one and rounded down, and keeps those with most attention from
    these rows, summed over the query heads of a KV head. With ``what="all"``, the last w = 0.1 a N keys stay, too; with
    "visual", all text does, so that there is no window, and all of a is shared. What clipping and rounding cut off is
    not given to other layers, so the budget is a ceiling. Nothing is evicted in decode, and peak memory does not fall.

    Args:
        keep: budget of all layers on average: a share a, or a count of keys of every head.
        what: "visual" keys, or "all" as published.
        threshold: of alive entries.
        clip: bounds of b; by default 0.009 and 1 (the port), 0.01 and 1 with ``window="layer"``.
        window: with ``what="all"``: share of the budget that is the last keys, the same number in every layer (the
            port); "layer" takes a tenth of every layer's own budget instead (the paper), rounded down.
        head_adaptive: whether KV heads choose by themselves; else by the sum of all heads.
        layer_adaptive: whether layers have budgets of their own.

    There is no official code; the port in EffiVLM-Bench is followed where the paper differs.

    Raises ``ValueError`` for numbers out of range.
    """

    keep: int | float = 0.25
    what: str = "visual"
    threshold: float = 0.01
    clip: tuple[float, float] | None = None
    window: float | str = 0.1
    head_adaptive: bool = True
    layer_adaptive: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_share(self.threshold, "threshold")
        if self.window != "layer":
            if isinstance(self.window, str):
                raise ValueError(f"window is a number from 0 to 1 or 'layer', not {self.window!r}")
            check_share(self.window, "window")
        if self.clip is not None and not 0 <= self.clip[0] <= self.clip[1] <= 1:
            raise ValueError(f"clip is two numbers, 0 <= lower <= upper <= 1, not {self.clip!r}")

    def moment(self) -> str:
        return "prompt"

    def summary(self, evidence: CacheEvidence) -> _Layer:
        there = evidence.there
        asks = question(evidence.visual, there)
        asks = torch.where(asks.any(1, keepdim=True), asks, evidence.last(1))
        rows = span(asks, evidence)
        mine = asks[:, evidence.n - rows :]
        scores = torch.zeros(there.shape, device=there.device)
        alive = torch.zeros(len(there), evidence.groups, dtype=torch.long, device=there.device)
        for start, block in evidence.blocks(rows):
            block = block.masked_fill(~mine[:, None, start : start + block.shape[2], None], 0.0)
            scores += block.sum((1, 2))
            alive += ((block >= self.threshold * block.amax(-1, keepdim=True)) & (block > 0)).sum((2, 3))
        if not self.head_adaptive:
            scores = over_heads(scores, evidence) * evidence.kv_heads
        check_finite(scores, there)
        visible = (there.long().cumsum(1)[:, evidence.n - rows :] * mine).sum(1, keepdim=True)
        density = evidence.unfold(alive.double() / visible.clamp(min=1)).mean((1, 2))
        return _Layer(evidence.bare(), scores, density)

    def decide(self, summaries: Sequence[_Layer]) -> list[Plan]:
        whole = torch.stack([layer.density for layer in summaries]).sum(0)
        return [self._layer(layer, whole, len(summaries)) for layer in summaries]

    def _layer(self, layer: _Layer, whole: Tensor, layers: int) -> Plan:
        evidence = layer.evidence
        among = candidates(evidence, self.what)
        number = among.sum(1, keepdim=True)
        n = number.double()
        share = self.keep / n.clamp(min=1) if isinstance(self.keep, int) else torch.full_like(n, self.keep)
        share = share.clamp(max=1.0)
        selected = 1.0 if self.what == "visual" or isinstance(self.window, str) else 1 - self.window
        if self.layer_adaptive:
            own = evidence.fold(torch.where(whole > 0, layer.density / whole, 1 / layers).unsqueeze(1))
            part = own * selected * share * layers
        else:
            part = selected * share
        low, high = self.clip if self.clip is not None else (0.01 if self.window == "layer" else 0.009, 1.0)
        count = part.clamp(low, high).mul(n).long().clamp(min=1)
        if self.what == "visual":
            recent = torch.zeros_like(number)
        elif isinstance(self.window, str):
            recent = (0.1 * count.double()).long()
            count = count - recent
        else:
            recent = (self.window * share * n).long().clamp(min=1 if self.window else 0)
        window = evidence.last(recent) & among
        stay = window | best(layer.scores, among & ~window, count) | (evidence.there & ~among)
        return keep_slots(stay | (share >= 1), evidence)
