"""The overlapping split of T2T-ViT (arXiv 2101.11986) as an average pooling of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import cells_of
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Pool
from tokenreduce.core.reducer import Reducer

__all__ = ["T2TPool"]


@dataclass(frozen=True)
class T2TPool(Reducer, name="t2t-pool", paper="2101.11986", title="T2T's overlapping split, averaged"):
    """T2T pooling: tokens become the means of overlapping windows of the grid.

    This is the geometry of T2T-ViT's soft split, without its training: there the tokens of a window are concatenated
    and go through a trained projection, here they are averaged, so that a token fits the blocks that follow. Windows of
    ``kernel`` x ``kernel`` tokens lie every ``stride`` rows and columns, beginning ``padding`` before the first: rows
    and columns / ``stride`` of them, rounded up for the published 3, 2, 1. A window at the border is the mean of what
    is there. An output stands at the place of the window's middle. The published splits of pixels (7x7 every 4) come
    before any model's own patches, so that only the later ones apply.

    Args:
        kernel, stride, padding: of the windows, in tokens.
        layer: 0-based layer that acts, between attention and MLP.
        keep: instead of ``stride``, tokens that stay, a count or a ratio: the windows are then the cells of average
            pooling, of which there are exactly so many, each with ``padding`` rows above and columns on the left of it.
            An extension.

    Tokens that fill no grid (others left before, frames of a clip) are one row. Raises ``ValueError`` for other values,
    windows that would miss tokens or lie outside (``stride`` above ``kernel``, ``padding`` of half a kernel or more),
    tokens protected by a mask, and a layer that the model does not have.
    """

    gridded: ClassVar[bool] = True

    kernel: int = 3
    stride: int = 2
    padding: int = 1
    layer: int = 0
    keep: int | float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("layer", 0)):
            check_count(getattr(self, name), name, least)
        if self.stride > self.kernel or 2 * self.padding > self.kernel:
            raise ValueError(
                f"windows of kernel={self.kernel} every stride={self.stride} with padding={self.padding} miss tokens "
                f"or are empty; stride is at most kernel, padding at most half of it"
            )

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: EncoderEvidence) -> Plan:
        """Raises ``ValueError`` for tokens that are protected by a mask: they are no grid behind a prefix."""
        if evidence.masked:
            raise ValueError(
                "t2t-pool needs a grid of tokens behind a prefix: give protected as a count, and no visual"
            )
        p, n = evidence.prefix, evidence.n - evidence.prefix
        grid = evidence.grid if evidence.grid is not None and math.prod(evidence.grid) == n else (1, n)
        rows, cols = grid if len(grid) == 2 else (1, n)
        if n == 0 or evidence.layer != self.layer or (self.keep is not None and count(self.keep, n) == n):
            return Identity.like(evidence.x)
        weights, middle = self._windows(rows, cols) if self.keep is None else self._cells(rows, cols)
        if len(weights) == n:
            return Identity.like(evidence.x)
        device = evidence.x.device
        full = torch.block_diag(torch.eye(p), weights).to(device).expand(evidence.batch, -1, -1)
        keep = torch.cat([torch.arange(p), p + middle]).to(device).expand(evidence.batch, -1)
        if evidence.valid is None:
            return Pool(evidence.n, full, keep=keep)
        full = full * evidence.valid.unsqueeze(1)
        there = full.sum(-1) > 0
        inside = evidence.valid.gather(1, keep)
        return Pool(evidence.n, full, valid=there, keep=torch.where(inside, keep, full.argmax(-1)))

    def _windows(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """(K,N) 1 for the tokens of every window, and (K,) the tokens in their middle."""
        down, middle_down = self._along(rows)
        right, middle_right = self._along(cols)
        return torch.kron(down, right), (middle_down[:, None] * cols + middle_right).flatten()

    def _along(self, n: int) -> tuple[Tensor, Tensor]:
        """(k,n) 1 for the rows (or columns) of every window, and (k,) those in their middle; one window of a single row
        where none fits."""
        number = max((n + 2 * self.padding - self.kernel) // self.stride, 0) + 1
        if (number - 1) * self.stride + self.kernel - self.padding < n:
            number += 1  # what would be left over at the end
        start = torch.arange(number) * self.stride - self.padding
        at = torch.arange(n)
        inside = (at >= start[:, None]) & (at < start[:, None] + self.kernel)
        return inside.float(), (start + self.kernel // 2).clamp(0, n - 1)

    def _cells(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        places = [(r, c) for r in range(rows) for c in range(cols)]
        cell = cells_of(places, count(self.keep, rows * cols), 1.0)  # type: ignore[arg-type]
        number = {name: i for i, name in enumerate(dict.fromkeys(cell))}
        which = torch.tensor([number[name] for name in cell])
        own = torch.nn.functional.one_hot(which, len(number)).T.float().view(-1, rows, cols)
        wider = own.clone()
        for side, size in ((1, rows), (2, cols)):
            base = wider.clone()
            for step in range(1, min(self.padding, size - 1) + 1):
                shifted = base.roll(-step, side)
                shifted.narrow(side, size - step, step).zero_()
                wider = torch.maximum(wider, shifted)
        return wider.flatten(1), own.flatten(1).argmax(1)
