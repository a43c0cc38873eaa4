"""Adaptive token sampling, ATS (arXiv 2111.15667): every image keeps as many tokens as its attention asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, finite, received_by_head
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.readable import readable, to_onnx
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers, staged

__all__ = ["ATS"]


@dataclass(frozen=True)
class ATS(
    Reducer,
    name="ats",
    stage="encoder",
    needs=("attention", "values"),
    paper="2111.15667",
    title="Adaptive Token Sampling",
):
    """ATS: samples tokens at equal steps of the cumulative significance, so that images keep different numbers.

    A patch's significance is the class token's attention to it (summed over heads) times the norm of its value vector.
    Sorted ascending and summed up, it forms a curve from 0 to 1; evenly spaced heights are looked up in it, and the
    tokens that are hit stay. There are as many heights as patches entered the model, or fewer with a limit.

    Args:
        layers: 0-based layers that sample; by default all from a quarter of the depth on (3 to 11 of 12).
        num_tokens: the most tokens that a layer may leave, class token included: a number, or one per layer of
            ``layers`` in ascending order. None: no limit. The official code cannot run with a limit; here, as in the
            published variants, there are then ``num_tokens - 1`` heights. Neither the official code's hidden least
            number nor its reading of values up to 1 as ratios is kept.
        keep: instead of ``num_tokens``, the most patches left after the last of ``layers``, a count or a ratio,
            reached by equal ratios. Fewer may stay, since several heights can hit one token. A layer whose share is
            still everything does nothing, so that ``keep=1.0`` is the identity (``num_tokens=None`` is not).
        head_norm: "concat" takes the norm of a value vector over all heads, as the official code does; "per_head"
            weighs each head's attention by the norm in this head.
        drop_tokens: pad to the largest number in the batch; if False, and in compiled graphs and under ``vmap``,
            which know no data, to the largest possible number. The slots behind a sample's own tokens are marked in
            ``plan.valid``.

    The order is: protected tokens, survivors by ascending significance, padding. The least significant patch never
    stays unless it is alone; neither does a patch of significance 0, unless all are 0, which counts as all being
    equal. With one height it is the top one. Slots that are not there take no part in a sample's curve (in the
    official code padding shifts it), so a sample's result does not depend on its batch. In a model without class token
    the mean attention that a patch receives stands for the class token's.

    Raises ``ValueError`` for bad settings, and for layers that the model does not have.
    """

    ragged: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    num_tokens: int | tuple[int | None, ...] | None = None
    keep: int | float | None = None
    head_norm: str = "concat"
    drop_tokens: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("layers", "num_tokens"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check_layers(self.layers, "layers")
        numbers = self.num_tokens if isinstance(self.num_tokens, tuple) else (self.num_tokens,)
        for number in numbers:
            if number is not None:
                check_count(number, "num_tokens", 2)
        if self.keep is not None and self.num_tokens is not None:
            raise ValueError("give num_tokens or keep, not both")
        if self.head_norm not in ("concat", "per_head"):
            raise ValueError(f"head_norm is 'concat' or 'per_head', not {self.head_norm!r}")

    def _layers(self, depth: int) -> tuple[int, ...]:
        chosen = tuple(range(depth // 4, depth)) if self.layers is None else tuple(sorted(self.layers))
        if chosen[-1] >= depth:
            raise ValueError(
                f"layers={self.layers!r}: the model has layers 0 to {depth - 1}; leave layers out for {depth // 4} on"
            )
        if isinstance(self.num_tokens, tuple) and len(self.num_tokens) != len(chosen):
            raise ValueError(f"num_tokens lists {len(self.num_tokens)} numbers for {len(chosen)} layers; give one each")
        return chosen

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth) and not (isinstance(self.keep, float) and self.keep == 1)

    def _heights(self, evidence: EncoderEvidence, patches: int) -> int | None:
        """Number of heights at this layer, of ``patches`` at the entry; None where the budget keeps everything."""
        layers = self._layers(evidence.depth)
        if evidence.layer not in layers:
            return None
        if self.keep is not None:
            left = staged(self.keep, evidence, layers)
            return None if left >= patches else left
        limit = self.num_tokens
        if isinstance(limit, tuple):
            limit = limit[layers.index(evidence.layer)]
        return patches if limit is None else min(limit - 1, patches)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        n, free = evidence.n, evidence.free()
        heights = self._heights(evidence, evidence.entry - (n - free))
        if heights is None or free < 2:
            return Identity.like(evidence.x)
        fixed = evidence.fixed()
        if fixed is None:
            fixed = torch.zeros(evidence.batch, n, dtype=torch.bool, device=evidence.x.device)
        candidate = ~fixed if evidence.valid is None else ~fixed & evidence.valid
        order, hit = _sample(finite(self._significance(evidence), evidence), candidate, heights)
        group = torch.where(fixed.gather(1, order), 0, torch.where(hit, 1, 2))
        order = order.gather(1, ascending(group))
        numbers = fixed.sum(1) + hit.sum(1)
        slots, least = n - free + min(heights, free - 1), 0
        if self.drop_tokens and readable(numbers):
            least, slots = torch.stack([numbers.min(), numbers.max()]).tolist()
        valid = None
        if least < slots:
            valid = torch.arange(slots, device=order.device) < numbers[:, None]
        return Prune(n, order[:, :slots], valid)

    def _significance(self, evidence: EncoderEvidence) -> Tensor:
        """(B,N), up to a factor per sample, which the curve does not see."""
        attention = evidence.attention("cls")[:, :, 0] if evidence.cls else received_by_head(evidence.attention)
        values = evidence.values.float()
        if self.head_norm == "per_head":
            return (attention * values.norm(dim=-1)).sum(1)
        return attention.sum(1) * values.square().sum((1, 3)).sqrt()


def _sample(scores: Tensor, candidate: Tensor, heights: int) -> tuple[Tensor, Tensor]:
    """Sampling points on the curve of cumulative ``scores`` (B,N) of the candidates.

    Returns (B,N) indices, no candidates first and candidates by ascending score, and which of these are hit.
    """
    n = scores.shape[1]
    scores = scores.masked_fill(~candidate, 0.0)
    flat = candidate & (scores.sum(1, keepdim=True) == 0)
    scores = torch.where(flat, 1.0, scores)
    order = ascending(scores.masked_fill(~candidate, -1.0))
    total = scores.gather(1, order).cumsum(1)
    first = (n - candidate.sum(1, keepdim=True)).clamp(max=n - 1)
    low = total.gather(1, first)
    curve = (total - low) / (total[:, -1:] - low).clamp(min=torch.finfo(total.dtype).tiny)
    place = torch.arange(n, device=scores.device)
    curve = torch.where(place < first, -1.0, curve)
    curve = torch.where(place == n - 1, 1.0, curve)  # also where one candidate is alone, 0 / 0
    start = torch.where(curve > 0, curve, 1.0).amin(1, keepdim=True)
    part = torch.linspace(0, 1, heights, device=scores.device) if heights > 1 else torch.ones(1, device=scores.device)
    points = start + part * (1 - start)
    above = _first_at(curve, points).clamp(max=n - 1)
    below = (above - 1).clamp(min=0)
    nearer = points - curve.gather(1, below) <= curve.gather(1, above) - points
    hit = torch.zeros_like(candidate).scatter(1, torch.where(nearer, below, above), 1)
    # A sample without candidates would hit its last protected token.
    return order, hit & candidate.gather(1, order)


def _first_at(curve: Tensor, points: Tensor) -> Tensor:
    """(B,P): the first place where the ascending ``curve`` (B,N) reaches each of ``points`` (B,P)."""
    if to_onnx():  # has no searchsorted
        return (curve.unsqueeze(1) < points.unsqueeze(2)).sum(-1)
    return torch.searchsorted(curve, points)
