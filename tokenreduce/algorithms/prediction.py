"""Predicting the units of an image from their neighbours: distances of pixels, and which units are predicted.

A *unit* is what a token is made of: a patch, or the patches that a merger makes one token of. Its vector holds its
pixels, in any order that is the same for all. Units lie on a grid; A is the one on the left, B the one above, C the one
above A. A unit is predicted to be A in the first row and B in the first column, and elsewhere B where C is like A and
not like B, else A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["apart", "predicted", "refuse_nan", "surprise"]


def apart(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """(...,) float32 distance of vectors (...,P): their largest difference ("max"), the mean of differences ("mae"), or
    the root of the mean of their squares ("rmse")."""
    gap = a.float() - b.float()
    if metric != "rmse":  # a vector norm of these orders is ten times as slow on a CPU
        gap = gap.abs_()
        return gap.amax(-1) if metric == "max" else gap.mean(-1)
    return torch.linalg.vector_norm(gap, dim=-1) / gap.shape[-1] ** 0.5


def refuse_nan(distances: Tensor) -> None:
    """Raise ``ValueError`` for distances of pixels that are not numbers."""
    if bool(distances.isnan().any()):
        raise ValueError("NaN in the pixels of an image: check the preprocessing")


def surprise(x: Tensor, limit: float, metric: str) -> Tensor:
    """(B,rows,cols) float32 distance of the units ``x`` (B,rows,cols,P) from what their neighbours predict, where units
    at most ``limit`` apart are alike; infinite for the first unit."""
    left, up = _neighbours(x, metric)
    return torch.where(_upwards(up[:, 1:, :-1] <= limit, left[:, :-1, 1:] <= limit), up, left)


def predicted(x: Tensor, limit: float, metric: str, anchored: bool = True) -> Tensor:
    """(B,rows,cols) bool: units of ``x`` (B,rows,cols,P) that are at most ``limit`` from what their neighbours predict;
    the first never is. Raises ``ValueError`` for NaN.

    ``anchored``: a unit that is predicted counts as its prediction for those behind it, so that what stands for a unit
    is never further from it than ``limit``. The result is that of a scan in raster order.
    """
    left, up = _neighbours(x, metric)
    refuse_nan(left.nan_to_num(posinf=0.0, nan=float("nan")))
    refuse_nan(up.nan_to_num(posinf=0.0, nan=float("nan")))
    if anchored and limit:  # what is equal to a unit is equal to all that it is equal to
        return _anchored(x, limit, metric, torch.minimum(left, up))
    return torch.where(_upwards(up[:, 1:, :-1] <= limit, left[:, :-1, 1:] <= limit), up, left) <= limit


def _neighbours(x: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(B,rows,cols) distances to the unit on the left and to the one above, infinite where there is none. Row by row,
    so that an image's pixels are read once."""
    none = float("inf")
    left, up = [], []
    for r in range(x.shape[1]):
        left.append(F.pad(apart(x[:, r, 1:], x[:, r, :-1], metric), (1, 0), value=none))
        up.append(apart(x[:, r], x[:, r - 1], metric) if r else torch.full_like(left[0], none))
    return torch.stack(left, 1), torch.stack(up, 1)


def _upwards(vertical: Tensor, level: Tensor) -> Tensor:
    """(B,rows,cols) whether the prediction of a unit is the one above, from whether C is like A, ``vertical``, and like
    B, ``level``, both (B,rows-1,cols-1)."""
    behind_first = F.pad(vertical & ~level, (1, 0), value=True)
    return F.pad(behind_first, (0, 0, 1, 0), value=False)


def _anchored(x: Tensor, limit: float, metric: str, nearest: Tensor) -> Tensor:
    """(B,rows,cols) bool, see :func:`predicted`; ``nearest`` is the distance to the nearer of left and above.

    Units on a line from the lower left to the upper right depend on earlier lines alone, so that each line is one step.
    What stands for a unit is at most ``limit`` from it, so that only units at most twice that from a neighbour can go:
    no others are looked at, and equal numbers are not compared.
    """
    batch, rows, cols, p = x.shape
    flat, own = x.reshape(-1, p), torch.arange(batch * rows * cols, device=x.device)
    stands = own.clone()
    maybe = (nearest <= 2 * limit * (1 + 1e-5)).flatten()
    maybe[:: rows * cols] = False
    cells = maybe.nonzero().flatten()
    row, col = cells // cols % rows, cells % cols
    line, order = (row + col).sort(stable=True)
    cells, row, col = cells[order], row[order], col[order]
    left = torch.where(col > 0, cells - 1, cells - cols)  # on the edges all neighbours are the one that predicts
    above = torch.where(row > 0, cells - cols, cells - 1)
    corner = torch.where((row > 0) & (col > 0), cells - cols - 1, torch.where(row > 0, above, left))
    counts = torch.bincount(line).tolist() if len(line) else []
    parts = (t.split(counts) for t in (cells, left, above, corner))
    for here, *around in zip(*parts, strict=True):
        if len(here):
            a, b, c = (stands.index_select(0, t) for t in around)
            stands.index_copy_(0, here, _line(flat, here, a, b, c, limit, metric))
    return (stands != own).view(batch, rows, cols)


def _line(flat: Tensor, here: Tensor, a: Tensor, b: Tensor, c: Tensor, limit: float, metric: str) -> Tensor:
    """(M,) what stands for the units ``here`` (M,) of ``flat`` (U,P), from what stands for those on the left, above and
    at the corner."""
    apart_ab = a != b
    first, second = torch.cat([c, c, here, here]), torch.cat([a, b, a, b])
    alike = first == second
    where = (~alike & torch.cat([apart_ab, apart_ab, torch.ones_like(apart_ab), apart_ab])).nonzero().flatten()
    if len(where):
        i, j = flat.index_select(0, first.index_select(0, where)), flat.index_select(0, second.index_select(0, where))
        alike.index_copy_(0, where, apart(i, j, metric) <= limit)
    like_ca, like_cb, like_a, like_b = alike.chunk(4)
    upwards = like_ca & ~like_cb & apart_ab
    return torch.where(torch.where(upwards, like_b, like_a), torch.where(upwards, b, a), here)
