"""HiPrune (arXiv 2508.00553): objects seen by a middle block with their surroundings, and what a deep block gathers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, check_layer, kept, saliency, top
from tokenreduce.algorithms.scoring import descending
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["BUFFERS", "HiPrune"]

BUFFERS = ("grid", "flat")


def _ranks(scores: Tensor) -> Tensor:
    """(B,N) the place of every token when the highest score comes first, ties to the lower index."""
    place = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return torch.empty_like(place).scatter(1, descending(scores), place)


@dataclass(frozen=True)
class HiPrune(Projector, name="hiprune", needs=("tower",), paper="2508.00553", title="HiPrune"):
    """HiPrune: hierarchical attention pruning by the mean attention that tokens receive; raster order.

    Anchors are the round(keep * alpha / 5) tokens (half to even, as published) with the highest attention in a middle
    block, and buffers their four neighbours. The budget is filled up with the tokens of highest attention in a deep
    block ("registers"). With few tokens there are no anchors. Averages run over heads and all queries, the class
    token's included; no class token is needed.

    Different from the official code: neighbours are those inside the grid (``buffers="flat"`` is the official rule,
    p - 1, p + 1, p - W, p + W in raster order, which crosses row ends and clamps to the first and last token);
    anchors and buffers that exceed ``keep`` are trimmed to those with the highest middle attention (an error there);
    and they are left out of the second choice for certain, where subtracting 1 from their attention can choose twice.

    Args:
        keep: 192, 128 or 64 of 576 in the paper; a count is for the whole image.
        alpha: share of anchors and buffers in [0, 1].
        object_layer: middle block: a 0-based index (negative from the end), a share of the depth (float), or None for
            the block whose output enters the projector. A third of the depth is block 8 of 24 in CLIP-L, the published
            layer 9 counted from 1. Qwen2.5-VL has its own published block, 15 of 32: most others see windows only.
        layer: deep block, in the same terms; None as published (Qwen2.5-VL: its last block).
        buffers: "grid" or "flat".
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 192
    alpha: float = 0.1
    object_layer: int | float | None = 1 / 3
    layer: int | float | None = field(default=None, kw_only=True)
    buffers: str = field(default="grid", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a number in [0, 1], not {self.alpha!r}")
        check_layer(self.object_layer, "object_layer")
        check_layer(self.layer)
        if self.buffers not in BUFFERS:
            raise ValueError(f"buffers is one of {BUFFERS}, not {self.buffers!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.object_layer, self.layer)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        middle = saliency(evidence, self.object_layer, "received")
        deep = saliency(evidence, self.layer, "received")
        anchors = top(middle, round(keep * self.alpha / 5))
        first = self._surround(torch.zeros_like(middle, dtype=torch.bool).scatter(1, anchors, True), evidence)
        # Anchors and buffers before all others, each kind by its own attention: one order for both cases.
        n = middle.shape[1]
        order = torch.where(first, _ranks(middle), n + _ranks(deep))
        return kept(order.argsort(1)[:, :keep], evidence)

    def _surround(self, anchors: Tensor, evidence: VisualEvidence) -> Tensor:
        """(B,N) bool: ``anchors`` and their neighbours."""
        if self.buffers == "flat":
            n, columns = anchors.shape[1], evidence.shape[1]
            at = torch.arange(n, device=anchors.device)
            out = anchors.long()
            for step in (-1, 1, -columns, columns):
                out = out.index_add(1, (at + step).clamp(0, n - 1), anchors.long())
            return out > 0
        row, column = evidence.place.to(anchors.device).unbind(1)
        grid = anchors.new_zeros(len(anchors), int(row.max()) + 3, int(column.max()) + 3)
        grid[:, row + 1, column + 1] = anchors
        out = anchors
        for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
            out = out | grid[:, row + down, column + right]
        return out
