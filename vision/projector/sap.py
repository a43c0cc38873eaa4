"""SAP, the training-free part of ATP-LLaVA (arXiv 2412.00447): an even grid of tokens, and the salient ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, kept, top
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["SpatialAugmented"]


@dataclass(frozen=True)
class SpatialAugmented(
    Salient, name="sap", needs=("tower",), paper="2412.00447", title="Spatial Augmented Pruning (ATP-LLaVA, part)"
):
    """SAP: a share of the budget goes to a uniform grid over the image, the rest to the tokens attended to most.

    The paper trains two thresholds that decide how many tokens of either kind stay; without training the share is
    fixed, so none of the paper's figures hold for this rule. The paper also ranks by attention inside the language
    model, here it is the class token's in the vision tower (or that received, without class token). The grid has the
    smallest stride g for which ceil(rows/g) * ceil(columns/g) <= round(beta * keep), half up, and starts at g // 2 (the
    last row or column where that lies outside); there is none where the right side is 0. Grid cells that were cut off
    as padding go to the ranking. Raster order, ties to the lower index.

    Args:
        keep: 144 of 576 on average in the paper.
        beta: share of the budget for the grid, 0 to 1 (ours; the paper learns it).
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for tokens that lie on no grid.
    """

    keep: int | float = 0.25
    beta: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 0 <= self.beta <= 1:
            raise ValueError(f"beta is a number in [0, 1], not {self.beta!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        scores = self.saliency(evidence)
        return kept(top(scores.masked_fill(self.grid(evidence, keep), float("inf")), keep), evidence)

    def grid(self, evidence: VisualEvidence, keep: int) -> Tensor:
        """(N,) bool: the tokens that stay for where they are."""
        (h, w), place = evidence.shape, evidence.place
        most = int(self.beta * keep + 0.5)
        if not most:
            return torch.zeros(len(place), dtype=torch.bool, device=place.device)
        g = next(g for g in range(1, max(h, w) + 1) if -(-h // g) * -(-w // g) <= most)
        row, column = min(g // 2, h - 1), min(g // 2, w - 1)
        return ((place[:, 0] - row) % g == 0) & ((place[:, 1] - column) % g == 0)
