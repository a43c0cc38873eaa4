"""Uniform pruning: every n-th token or a regular sub-grid, whatever the image shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.budget import check_count, check_keep, count
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Identity, Plan, Prune
from tokenreduce.reducer import Reducer
from tokenreduce.scoring import select

__all__ = ["Uniform", "sub_grid"]


@dataclass(frozen=True)
class Uniform(Reducer, name="uniform", title="Uniform pruning"):
    """Uniform pruning: in one layer, keep tokens at equal distances.

    Of F tokens that may go, K stay: those at floor((i+1/2) F/K). Where the grid is known, K is rows times columns of a
    sub-grid, and its two strides differ by a factor of at most 2, the rows and columns of that sub-grid stay instead
    (the one with the most equal strides), so that both directions are thinned alike.

    Args:
        every: without ``keep``, one token of ``every`` stays.
        layer: 0-based layer that acts.
        keep: tokens that stay, a count or a ratio.

    Raises ``ValueError`` for bad values or a layer that the model does not have.
    """

    every: int = 2
    layer: int = 0
    keep: int | float | None = None

    def __post_init__(self) -> None:
        check_count(self.every, "every", 1)
        check_count(self.layer, "layer")
        check_keep(self.keep)
        if self.keep is not None and self.every != 2:
            raise ValueError("give every or keep, not both")

    def acts(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: Evidence) -> Plan:
        free = evidence.free()
        k = count(1 / self.every if self.keep is None else self.keep, free)
        if k >= free or evidence.layer != self.layer:
            return Identity.like(evidence.x)
        return Prune(evidence.n, select(_marked(evidence, k), k, evidence))


def _marked(evidence: Evidence, k: int) -> Tensor:
    """(B,N) 1 for tokens that stay, 0 for others; protected tokens and slots without a token do not count along."""
    device = evidence.x.device
    plain = evidence.visual is None and isinstance(evidence._protected, int) and evidence.valid is None
    if not plain:
        may_go = torch.ones(evidence.batch, evidence.n, dtype=torch.bool, device=device)
        for blocked in (evidence.fixed(), None if evidence.valid is None else ~evidence.valid):
            may_go = may_go if blocked is None else may_go & ~blocked
        rank = may_go.long().cumsum(1) - 1
        return (_chosen(rank, k, may_go.sum(1, keepdim=True)) & may_go).float()
    p, free = evidence.prefix, evidence.free()
    grid = None if evidence.grid is None else sub_grid(evidence.grid, k)
    if grid is None or evidence.grid is None or math.prod(evidence.grid) != free:
        chosen = _chosen(torch.arange(free, device=device), k, free)
    else:
        rows, cols = (
            _chosen(torch.arange(side, device=device), part, side)
            for side, part in zip(evidence.grid[-2:], grid, strict=True)
        )
        chosen = (rows.unsqueeze(1) & cols).flatten()
    return torch.cat([torch.zeros(p, device=device), chosen.float()]).expand(evidence.batch, -1)


def _chosen(rank: Tensor, k: int, total: int | Tensor) -> Tensor:
    """Whether ``rank`` is one of floor((i+1/2) total/k), i < k, in integers."""

    def below(t: Tensor) -> Tensor:  # how many of the k places are below t
        return (2 * t * k - 1 + total) // (2 * total)

    return below(rank + 1) > below(rank)


def sub_grid(grid: tuple[int, ...], k: int) -> tuple[int, int] | None:
    """Rows and columns with product ``k`` inside a grid (H,W) or (1,H,W), strides as equal as possible.

    None when there are none whose strides differ by a factor of at most 2. Equally good ones: the one with more rows.

    >>> sub_grid((14, 14), 49), sub_grid((14, 14), 98), sub_grid((14, 14), 97)
    ((7, 7), (14, 7), None)
    """
    if len(grid) < 2 or math.prod(grid[:-2]) != 1:
        return None
    height, width = grid[-2:]
    best = None
    for rows in range(min(height, k), 0, -1):
        cols = k // rows
        if rows * cols != k or cols > width:
            continue
        skew = abs(math.log((height * cols) / (width * rows)))
        if skew <= math.log(2) + 1e-9 and (best is None or skew < best[0] - 1e-9):
            best = skew, (rows, cols)
    return None if best is None else best[1]
