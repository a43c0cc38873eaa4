"""Destinations on a grid: one token of every cell takes tokens in, the others look for the most similar one."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, inner

__all__ = ["in_cells", "nearest", "others"]

#: Most similarities that are held at a time.
_HELD = 1 << 24


def in_cells(grid: tuple[int, int], cell: tuple[int, int], offsets: Tensor) -> Tensor:
    """(cells,) ascending places, row-major, of one token in every whole ``cell`` (rows, columns) of ``grid`` (H,W).

    ``offsets`` (cells,) are its row-major places within the cells, which are row-major too. Rows and columns behind the
    last whole cell belong to none.

    >>> in_cells((4, 5), (2, 2), torch.tensor([0, 3, 1, 2])).tolist()
    [0, 8, 11, 17]
    """
    (h, w), (sy, sx) = grid, cell
    rows, columns = h // sy, w // sx
    inside = (offsets // sx) * w + offsets % sx
    corner = torch.arange(rows, device=offsets.device)[:, None] * (sy * w)
    corner = corner + torch.arange(columns, device=offsets.device) * sx
    return (corner.reshape(-1) + inside).sort().values


def others(chosen: Tensor, n: int) -> Tensor:
    """(n-K,) ascending places that are not among ``chosen`` (K,), which are different ones of ``n``."""
    marked = torch.zeros(n, dtype=torch.long, device=chosen.device).scatter(0, chosen, 1)
    return ascending(marked)[: n - chosen.shape[0]]  # of known length, where a boolean index has none in a graph


def nearest(m: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(similarity, partner)`` (B,S): the largest inner product of each of ``m[:, source]`` with one of
    ``m[:, target]``, and which of these it is, the lowest of equals. ``m`` (B,N,d); not all (B,S,T) are held at once.
    """
    goal = m[:, target]
    step = max(1, _HELD // max(1, goal.shape[0] * goal.shape[1]))
    found = [inner(m[:, part], goal).max(-1) for part in source.split(step)]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)
