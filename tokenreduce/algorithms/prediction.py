"""Predicting the units of an image from their neighbours: distances of pixels, and which units are predicted.

A *unit* is what a token is made of: a patch, or the patches that a merger makes one token of. Its vector holds its
pixels, in any order that is the same for all. Units lie on a grid; A is the one on the left, B the one above, C the one
above A. A unit is predicted to be A in the first row and B in the first column, and elsewhere B where C is like A and
not like B, else A.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.core.host import on_host, values

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
    if x.numel():
        refuse_nan(x.amax())
    chained = anchored and limit > 0
    left, up = _neighbours(x, metric, _reach(limit) if chained else limit)
    if chained:  # what is equal to a unit is equal to all that it is equal to
        return _anchored(x, limit, metric, left, up)
    return torch.where(_upwards(up[:, 1:, :-1] <= limit, left[:, :-1, 1:] <= limit), up, left) <= limit


def _reach(limit: float) -> float:
    """How far from a neighbour a unit may be that counts as its own prediction, whatever stands for the neighbour."""
    return 2 * limit * (1 + 1e-5)


def _neighbours(x: Tensor, metric: str, most: float = float("inf")) -> tuple[Tensor, Tensor]:
    """(B,rows,cols) distances to the unit on the left and to the one above, infinite where there is none, and perhaps
    where it is above ``most``. Row by row, so that an image's pixels are read once."""
    none = float("inf")
    if metric == "max" and x.dtype == torch.float32 and on_host(x):
        return _furthest(values(x), most)
    left, up = [], []
    for r in range(x.shape[1]):
        left.append(F.pad(apart(x[:, r, 1:], x[:, r, :-1], metric), (1, 0), value=none))
        up.append(apart(x[:, r], x[:, r - 1], metric) if r else torch.full_like(left[0], none))
    return torch.stack(left, 1), torch.stack(up, 1)


def _furthest(x: Any, most: float) -> tuple[Tensor, Tensor]:
    """:func:`_neighbours` by the largest difference, of an array: one buffer, which stays in the cache. Units whose
    first pixels are further apart than ``most`` already are not looked at again."""
    left, up = (np.full(x.shape[:3], np.inf, np.float32) for _ in range(2))
    gap = np.empty((x.shape[0], *x.shape[2:]), np.float32)
    few = max(x.shape[-1] // 16, min(64, x.shape[-1]))

    def apart_from(a: Any, b: Any, out: Any) -> None:
        if np.isfinite(most):
            here = gap[:, : a.shape[1], :few]
            np.subtract(a[..., :few], b[..., :few], out=here)
            near = np.abs(here, out=here).max(-1) <= most
            if 8 * np.count_nonzero(near) <= near.size:  # to pick them out costs more than to read on
                at = near.nonzero()
                out[at] = np.abs(a[at] - b[at]).max(-1)
                return
        if not most:
            out[(a == b).all(-1)] = 0
            return
        here = gap[:, : a.shape[1]]
        np.subtract(a, b, out=here)
        np.abs(here, out=here).max(-1, out=out)

    for r in range(x.shape[1]):
        apart_from(x[:, r, 1:], x[:, r, :-1], left[:, r, 1:])
        if r:
            apart_from(x[:, r], x[:, r - 1], up[:, r])
    return torch.from_numpy(left), torch.from_numpy(up)


def _upwards(vertical: Tensor, level: Tensor) -> Tensor:
    """(B,rows,cols) whether the prediction of a unit is the one above, from whether C is like A, ``vertical``, and like
    B, ``level``, both (B,rows-1,cols-1)."""
    behind_first = F.pad(vertical & ~level, (1, 0), value=True)
    return F.pad(behind_first, (0, 0, 1, 0), value=False)


def _anchored(x: Tensor, limit: float, metric: str, left: Tensor, up: Tensor) -> Tensor:
    """(B,rows,cols) bool, see :func:`predicted`; ``left`` and ``up`` are the distances to these neighbours.

    Units on a line from the lower left to the upper right depend on earlier lines alone, so that each line is one step.
    What stands for a unit is at most ``limit`` from it, so that only units at most twice that from a neighbour can go:
    no others are looked at, and units that are equal, as a chain of neighbours without a difference says, are not
    compared.
    """
    batch, rows, cols, p = x.shape
    flat, own = x.reshape(-1, p), np.arange(batch * rows * cols)
    stands, same = own.copy(), _equals(_host(left == 0), _host(up == 0))
    maybe = _host(torch.minimum(left, up) <= _reach(limit)).ravel()
    maybe[:: rows * cols] = False
    cells = maybe.nonzero()[0]
    row, col = cells // cols % rows, cells % cols
    order = (row + col).argsort(kind="stable")
    cells, row, col = cells[order], row[order], col[order]
    before = np.where(col > 0, cells - 1, cells - cols)  # on the edges all neighbours are the one that predicts
    above = np.where(row > 0, cells - cols, cells - 1)
    corner = np.where((row > 0) & (col > 0), cells - cols - 1, np.where(row > 0, above, before))

    def alike(one: Any, other: Any, asked: Any) -> Any:
        out = same[one] == same[other]
        where = (~out & asked).nonzero()[0]
        if len(where):
            i, j = (flat.index_select(0, torch.from_numpy(t[where]).to(flat.device)) for t in (one, other))
            out[where] = _host(apart(i, j, metric) <= limit)
        return out

    ends: Any = np.bincount(row + col).cumsum()[:-1] if len(cells) else []
    for here, *around in zip(*(np.split(t, ends) for t in (cells, before, above, corner)), strict=True):
        if not len(here):
            continue
        a, b, c = (stands[t] for t in around)
        two, all_ = a != b, np.ones_like(a, dtype=bool)
        # Of one unit on both sides nothing else is asked than whether this one is like it.
        pairs = ((c, a, two), (c, b, two), (here, a, all_), (here, b, two))
        like_ca, like_cb, like_a, like_b = alike(*map(np.concatenate, zip(*pairs, strict=True))).reshape(4, -1)
        upwards = like_ca & ~like_cb & two
        stands[here] = np.where(np.where(upwards, like_b, like_a), np.where(upwards, b, a), here)
    return torch.from_numpy(stands != own).view(batch, rows, cols).to(x.device)


def _host(t: Tensor) -> Any:
    return t.cpu().numpy()


def _equals(left: Any, up: Any) -> Any:
    """(B*rows*cols,) a number of every unit, the same only for units that are equal, from whether they are equal to the
    one on the left and to the one above."""
    batch, rows, cols = left.shape
    out = np.arange(batch * rows * cols).reshape(batch, rows, cols)
    begins = np.maximum.accumulate(np.where(left, 0, np.arange(cols)), 2)  # of runs of equal units in a row
    for r in range(rows):
        if r:
            out[:, r] = np.where(up[:, r], out[:, r - 1], out[:, r])
        out[:, r] = np.take_along_axis(out[:, r], begins[:, r], 1)
    return out.ravel()
