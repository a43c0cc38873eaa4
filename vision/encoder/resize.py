"""Resize: the baseline that asks whether a smaller image would have done as well."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.baseline import resampling
from tokenreduce.core.budget import check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Pool
from tokenreduce.core.reducer import Reducer

__all__ = ["Resize"]


@dataclass(frozen=True)
class Resize(Reducer, name="resize", position="input", title="Smaller input image"):
    """Resize: shrink the image so that about ``keep`` of its patches remain; nothing is done in the blocks.

    Rows and columns are whole numbers, so their product is the nearest to the wanted number among the grids that keep
    the image's aspect ratio to within one patch along the shorter side; ties go to the truer aspect ratio, then to the
    smaller grid. The image is never enlarged. Models resample their position embeddings as they do for any image size.

    Args:
        keep: patches that remain of an image, a count or a ratio.
        scale: without ``keep``, the factor on both sides of the image.

    :meth:`plan` describes the same step on a grid of patches: antialiased bilinear resampling, prefix tokens one to
    one. It is for comparison with other methods; models are given a smaller image, not this plan.

    Raises ``ValueError`` for a bad ``keep``, a ``scale`` outside (0, 1], or both.
    """

    keep: int | float | None = None
    scale: float = 0.75

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 < self.scale <= 1:
            raise ValueError(f"scale is a factor on the image's sides, in (0, 1], not {self.scale!r}")
        if self.keep is not None and self.scale != 0.75:
            raise ValueError("give scale or keep, not both")

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of the smaller image, for those of the original.

        >>> Resize(keep=0.5).grid((14, 14)), Resize(keep=49).grid((14, 14)), Resize(keep=0.25).grid((12, 24))
        ((10, 10), (7, 7), (6, 12))
        """
        rows, cols = (operator.index(side) for side in grid)  # numbers also where a graph is traced
        target = count(self.scale**2 if self.keep is None else self.keep, rows * cols)

        def cost(size: tuple[int, int]) -> tuple[int, float, int]:
            r, c = size
            skew = abs(math.log((c * rows) / (r * cols)))
            return abs(r * c - target), round(skew, 9), r * c

        # Off by at most one patch along the shorter side.
        slack, sizes = max(rows, cols), []
        for r in range(1, rows + 1):
            least, most = -((slack - r * cols) // rows), (r * cols + slack) // rows
            sizes += [(r, c) for c in range(max(1, least), min(cols, most) + 1)]
        return min(sizes, key=cost)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        """Raises ``ValueError`` for tokens that are protected by a mask: they are no grid behind a prefix."""
        if evidence.masked:
            raise ValueError("resize needs a grid of tokens behind a prefix: give protected as a count, and no visual")
        patches, p = evidence.free(), evidence.prefix
        frames, rows, cols = _layout(evidence.grid, patches)
        small = self.grid((rows, cols))
        if patches == 0 or small == (rows, cols):
            return Identity.like(evidence.x)
        device = evidence.x.device
        weights = torch.kron(resampling(rows, small[0], device), resampling(cols, small[1], device))
        weights = torch.block_diag(torch.eye(p, device=device), *[weights] * frames)
        return Pool(evidence.n, weights.expand(evidence.batch, -1, -1))


def _layout(grid: tuple[int, ...] | None, patches: int) -> tuple[int, int, int]:
    """(frames, rows, columns); a square without a matching grid, else one row."""
    if grid is not None and math.prod(grid) == patches:
        return math.prod(grid[:-2]), *grid[-2:]  # type: ignore[return-value]
    side = math.isqrt(patches)
    return (1, side, side) if side and side * side == patches else (1, 1, max(1, patches))
