"""How the tokens of an image lie on a grid, as far as sizes that the model was given say it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.projector.origin import grid
from tokenreduce.core.evidence import Origin

__all__ = ["Shape", "origin_of", "shapes"]

#: Frames, rows and columns of an image's tokens.
Shape = tuple[int, int, int]


def shapes(given: dict[str, Any], lengths: list[int]) -> tuple[list[int], list[Shape | None]]:
    """Tokens of every image and their grid, None where nobody says it.

    ``given`` are the arguments of ``get_image_features``. Among them may stand (images,2) or (images,3) numbers of rows
    and columns, or frames, rows and columns, of pixels or patches; r x r of them are a token where that makes as many
    as there are. ``lengths`` are the rows that the output tells apart, which may hold several images.
    """
    for value in given.values():
        if isinstance(value, list) and value and all(isinstance(v, list | tuple) and len(v) in (2, 3) for v in value):
            value = torch.tensor(value)
        if (
            not isinstance(value, Tensor)
            or value.is_floating_point()
            or value.dim() != 2
            or value.shape[1] not in (2, 3)
        ):
            continue
        sizes = [(1, *s) if len(s) == 2 else tuple(s) for s in value.tolist()]
        if (found := _by_sizes(sizes, lengths)) is not None:
            return found
    pixels = next((v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 4), None)
    square = pixels is not None and pixels.shape[-1] == pixels.shape[-2] and pixels.shape[-3] in (1, 3, 4)
    out: list[Shape | None] = []
    for n in lengths:
        side = math.isqrt(n)
        out.append((1, side, side) if square and side * side == n and n else None)
    return lengths, out


def _by_sizes(sizes: list[Any], lengths: list[int]) -> tuple[list[int], list[Shape | None]] | None:
    areas, total = [t * h * w for t, h, w in sizes], sum(lengths)
    if not total or sum(areas) % total:
        return None
    r = math.isqrt(sum(areas) // total)
    if r * r * total != sum(areas) or any(h % r or w % r for _, h, w in sizes):
        return None
    own = [a // (r * r) for a in areas]
    if len(own) == len(lengths) and own != lengths:
        return None
    return own, [(t, h // r, w // r) for t, h, w in sizes]


def origin_of(shape: Shape | None, n: int, device: Any) -> Origin:
    """Where ``n`` tokens come from when nobody looked: each is a place of its own on the grid, or in a row."""
    t, h, w = (1, 1, n) if shape is None else shape
    one = grid(h, w, device)
    return one if t == 1 else one.repeat(t)
