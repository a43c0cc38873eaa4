"""Where the visual tokens of each family come from: from the patches of a tower to the columns of a prompt.

Between them families pool, merge 2x2 patches, shuffle pixels, tile images, cut off padding and add row ends. Where a
family's own code does it, its code is run on coordinates instead of features, so that both agree by construction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.evidence import Origin

__all__ = ["blocks_of_patches", "grid", "pooled", "tiled", "with_class", "with_end"]


@functools.lru_cache(maxsize=64)
def grid(rows: int, columns: int, device: Any = None) -> Origin:
    """One view whose patches are the tokens."""
    n = rows * columns
    at = torch.arange(n, device=device)
    return Origin(at[:, None], None, n, torch.zeros_like(at), _places(rows, columns, device), (rows, columns), count=1)


@functools.lru_cache(maxsize=64)
def blocks_of_patches(rows: int, columns: int, r: int, *, packed: bool, device: Any = None) -> Origin:
    """One view of (rows, columns) patches, r x r of which become a token. ``packed`` patches come token by token
    (Qwen), others row by row (pixel shuffle)."""
    h, w = rows // r, columns // r
    if packed:
        index = torch.arange(h * w * r * r, device=device).view(h * w, r * r)
    else:
        at = torch.arange(rows * columns, device=device).view(h, r, w, r)
        index = at.permute(0, 2, 1, 3).reshape(h * w, r * r)
    view = torch.zeros(h * w, dtype=torch.long, device=device)
    return Origin(index, None, rows * columns, view, _places(h, w, device), (h, w), count=1)


def pooled(pool: Callable[[Tensor], Tensor], patches: int, device: Any = None) -> Origin:
    """One view through a linear ``pool`` of features (1,patches,C) to (1,n,C), as read off the identity matrix."""
    share = pool(torch.eye(patches, device=device)[None])[0].detach()
    n = share.shape[0]
    most = int((share != 0).sum(1).max())
    weight, index = share.topk(most, dim=1)
    side = math.isqrt(n)
    rows, columns = (side, side) if side * side == n else (1, n)
    view = torch.zeros(n, dtype=torch.long, device=device)
    return Origin(
        index, weight / weight.sum(1, keepdim=True), patches, view, _places(rows, columns, device), (rows, columns),
        count=1,
    )  # fmt: skip


def with_class(one: Origin) -> Origin:
    """``one`` behind a token for the class token of the tower, which stands for no patch."""
    return _blank(one, front=True)


def with_end(video: Origin) -> Origin:
    """``video`` with a row end behind its last token."""
    return _blank(video, front=False)


def _blank(one: Origin, front: bool) -> Origin:
    weight = torch.full(one.index.shape, 1 / one.index.shape[1], device=one.index.device)
    weight = weight if one.weight is None else one.weight
    parts = [
        (one.index, one.index.new_zeros(1, one.index.shape[1])),
        (weight, weight.new_zeros(1, weight.shape[1])),
        (one.view, one.view.new_full((1,), -1)),
        (one.place, one.place.new_zeros(1, 2)),
    ]
    index, weight, view, place = (torch.cat([b, a] if front else [a, b]) for a, b in parts)
    return Origin(index, weight, one.patches, view, place, one.shape, one.crops, one.views)


def tiled(
    pack: Callable[[Tensor], Tensor], views: int, side: int, crops: tuple[int, int], device: Any = None
) -> tuple[Origin, bool]:
    """An overview and crops through ``pack``, the model's own packing of features (views,side*side,C) to (n,C) with
    zeros as row ends. Also returns whether tokens are patches, and not interpolated from several."""
    n, (rows, columns) = side * side, crops
    own = _places(side, side, device)
    coordinates = torch.zeros(views, n, 3, device=device)
    for v in range(views):
        corner = divmod(v - 1, columns) if v else (0, 0)
        place = own + torch.tensor(corner, device=device) * side
        coordinates[v] = torch.cat([place, torch.full_like(place[:, :1], 1 if v == 0 else 2)], 1)
    out = pack(coordinates)
    part = out[:, 2].round().long()
    place = out[:, :2].round().long()
    exact = bool((place == out[:, :2]).all())
    limit = torch.tensor([rows * side - 1, columns * side - 1], device=device)
    place = torch.minimum(place.clamp(min=0), limit)
    crop = 1 + place[:, 0] // side * columns + place[:, 1] // side
    view = torch.where(part == 0, -1, torch.where(part == 1, 0, crop))
    index = view.clamp(min=0) * n + place[:, 0] % side * side + place[:, 1] % side
    index = torch.where(part == 0, 0, index)
    weight = (part > 0).float()[:, None]
    return Origin(index[:, None], weight, n, view, place, (side, side), crops if views > 1 else None, views), exact


def _places(rows: int, columns: int, device: Any) -> Tensor:
    at = torch.arange(rows * columns, device=device)
    return torch.stack([at // columns, at % columns], 1)
