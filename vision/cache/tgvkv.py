"""TGV-KV (arXiv 2606.03075): text behind the image, weighted by how much later text needs it, judges visual keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import above_share, carried, marked_sums, over_heads
from tokenreduce.algorithms.keys import candidates, check_finite, check_what, keep_slots
from tokenreduce.algorithms.sequence import best, question
from tokenreduce.algorithms.shares import allot, check_ratio, total_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["TGVKV"]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer: what keys are worth, (B*Hkv,N), the same for all heads of a sample, and how much text
    attends to images, (B,) double."""

    evidence: CacheEvidence
    scores: Tensor
    strength: Tensor


@dataclass(frozen=True)
class TGVKV(CacheReducer, name="tgv-kv", needs=("attention",), paper="2606.03075", title="TGV-KV"):
    """TGV-KV: behind the last layer's prefill, share one budget over the layers by how much text attends to images.

    Attention is averaged over all query heads, and only the queries of the text behind the last visual token judge
    visual keys. A layer's part of the budget is in proportion to g, all that this text gives to visual keys; what goes
    is rounded half to even, and what a layer has beyond its keys is lost. A text token's weight is the mean of what it
    gets from itself and the text behind it; a visual key is worth the attention that text gives it, each token times
    its weight. Visual keys go first, the lowest worth before others. With ``what="all"``, text goes when no visual key
    is left, by the attention of all queries of the prompt; the first ``start_size`` slots and the last always stay.
    All heads of a layer keep the same slots.
    With ``what="all"``, decode drops one slot of a layer whenever it has at least one more than its share of the tokens
    seen: the one with least attention from the new token, from slot ``start_size`` on, and not among as many last
    slots as the prompt's text behind the image left. With "visual", decode drops nothing. Peak memory does not fall.

    Args:
        keep: budget of all layers on average, a share or a count; 0.05 to 0.5 in the paper.
        what: "visual": all text stays, and only visual keys are counted; "all" as published.
        ratio: instead of ``keep``, with ``what="all"``: the share that goes, as in the code.
        start_size: first slots that stay.
        redistribute: whether what one layer cannot use goes to the others.

    The code is followed, with its offset of 100 for text replaced by an order of the two kinds. Where the prompt's cut
    leaves no visual slot, all its text from slot ``start_size`` on counts as behind the image in decode. Samples
    without visual tokens are left alone.

    Raises ``ValueError`` for numbers out of range, ``ratio`` beside ``keep`` or with ``what="visual"``, and in a
    forward for a sample with an image and no text behind it.
    """

    keep: int | float = 0.25
    what: str = "visual"
    ratio: float | None = None
    start_size: int = 4
    redistribute: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.start_size, "start_size")
        check_ratio(self.ratio, self.what, self.keep == type(self).keep)

    def moment(self) -> str:
        return "prompt"

    def every(self) -> int:
        return 1 if self.what == "all" else 0

    # -- behind the prompt -------------------------------------------------------------------------------------------
    def summary(self, evidence: CacheEvidence) -> _Layer:
        there, visual = evidence.there, evidence.visual
        asks = question(visual, there)
        if bool((visual.any(1) & ~asks.any(1)).any()):
            raise ValueError(
                "tgv-kv judges visual keys by the text behind the last image, and a prompt ends in an image; put the "
                "question behind it, or take snapkv"
            )
        got = over_heads(marked_sums(evidence, asks).mean(1), evidence)
        strength = evidence.unfold((got.double() * visual).sum(1)).mean(1)
        later = asks.long().flip(1).cumsum(1).flip(1)
        weights = (got / later.clamp(min=1)).masked_fill(~asks, 0.0)
        scores = over_heads(marked_sums(evidence, asks, weights).mean(1), evidence)
        if self.what == "all":
            scores = torch.where(visual, scores, over_heads(evidence.column_sums().mean(1), evidence))
        check_finite(scores, there)
        return _Layer(evidence.bare(), scores, strength)

    def decide(self, summaries: Sequence[_Layer]) -> list[Plan]:
        n = torch.stack([s.evidence.unfold(candidates(s.evidence, self.what))[:, 0].sum(1) for s in summaries], 1)
        strength = torch.stack([s.strength for s in summaries], 1)
        whole = strength.sum(1, keepdim=True)
        part = torch.where(whole > 0, strength / whole, 1 / len(summaries))
        removed = self._removed(part, n)
        plans = []
        for layer, gone in zip(summaries, removed.unbind(1), strict=True):
            evidence, visual = layer.evidence, layer.evidence.visual
            free = candidates(evidence, self.what) & ~evidence.first(self.start_size) & ~evidence.last(1)
            goes = evidence.fold(gone.unsqueeze(1)) * visual.any(1, keepdim=True)
            stay = ~free
            for kind in (free & visual, free & ~visual):
                number = kind.sum(1, keepdim=True)
                mine = torch.minimum(goes, number)
                stay, goes = stay | best(layer.scores, kind, number - mine), goes - mine
            plans.append(keep_slots(stay, evidence))
        return plans

    def _removed(self, part: Tensor, n: Tensor) -> Tensor:
        """(B,L) keys that go, of ``n`` (B,L), where layers get ``part`` (B,L) of the budget."""
        if self.ratio is not None:
            total = n.sum(1, keepdim=True).double() * (1 - self.ratio)
        elif isinstance(self.keep, int):
            total = n.clamp(max=self.keep).sum(1, keepdim=True).double()
        else:
            total = n.sum(1, keepdim=True).double() * self.keep
        if self.redistribute:
            whole = total.add(0.5).long() if self.ratio is not None else total_of(self.keep, n)
            return n - allot(part, whole, torch.zeros_like(n), n)
        removed = (n - total * part).round().long().clamp(min=0)
        return torch.where(total >= n.sum(1, keepdim=True), 0, removed)

    # -- in decode ---------------------------------------------------------------------------------------------------
    def score(self, evidence: CacheEvidence) -> Tensor | None:
        """How many slots of text behind the image the prompt's cut left, at every slot: it holds for the whole answer,
        also when they are gone."""
        if self.what != "all" or not evidence.step:
            return None
        return self._behind(evidence).float().expand(-1, evidence.n).contiguous()

    def _behind(self, evidence: CacheEvidence) -> Tensor:
        there, visual = evidence.there, evidence.visual
        prompt = there & ~evidence.last(evidence.step)
        own = torch.where(visual.any(1, keepdim=True), question(visual, there), ~evidence.first(self.start_size))
        return carried(evidence, (own & prompt).sum(1, keepdim=True).clamp(min=1))

    def plan(self, evidence: CacheEvidence) -> Plan:
        if not evidence.step:
            return super().plan(evidence)
        over = above_share(evidence, self.name)
        if not bool(over.any()):
            return Identity.like(evidence.keys)
        row = over_heads(evidence.rows(1)[:, :, -1].mean(1), evidence)
        free = evidence.there & ~evidence.first(self.start_size) & ~evidence.last(self._behind(evidence))
        check_finite(row, free)
        number = free.sum(1, keepdim=True)
        stay = best(row, free, number - over.long())
        return keep_slots(stay | (evidence.there & ~free), evidence)
