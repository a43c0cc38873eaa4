"""What baselines of several stages share: reproducible draws, tokens at equal distances, cells of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenreduce.algorithms.projector import share
from tokenreduce.algorithms.scoring import finite, refuse_nan
from tokenreduce.algorithms.temporal import frames_of
from tokenreduce.core.evidence import BaseEvidence, CacheEvidence, ImageEvidence, VisualEvidence
from tokenreduce.core.host import not_a_number, on_host

__all__ = [
    "cells", "draw", "draws", "evenly", "full_grid", "mixed_seed", "regular", "resampling", "scramble", "spread",
    "sub_grid",
]  # fmt: skip

_BITS = 0xFFFFFFFF
#: Channels whose means identify a sample, and quantisation steps per root mean square of its features.
_CHANNELS, _STEPS = 4, 16


# -- draws -------------------------------------------------------------------------------------------------------------
def draw(evidence: BaseEvidence, seed: int, among: Tensor | None = None) -> Tensor:
    """(B,N) uniform numbers in [0, 2^24), exact in float32.

    A hash of ``seed``, the layer, the token's place and the sample's own content, and of nothing else. A random
    generator would give a sample other tokens in another batch or at another place of it, on another device or in a
    compiled model, and would make the plan depend on what was drawn before. Content enters as the means over tokens of
    the first four channels, divided by the root mean square of the sample's features and rounded to 1/16: coarse, so
    that the last bits of a feature, which differ between devices and batch sizes, change no draw except where a mean
    happens to lie on a rounding edge. Samples with equal rounded means get equal draws.

    ``among`` (B,N) bool: content is that of these tokens and places are counted among them, so that what stands around
    them (text, padding) changes nothing; numbers of other tokens have no meaning. By default places are columns, and
    slots without a token are left out of the means.
    """
    return draws(evidence.x, seed, evidence, evidence.valid, among)


def draws(
    x: Tensor, seed: int, evidence: BaseEvidence | CacheEvidence, valid: Tensor | None, among: Tensor | None = None
) -> Tensor:
    """What :func:`draw` says, for features ``x`` (B,N,C) and slots that are there, ``valid`` (B,N)."""
    start = mixed_seed(seed, evidence.layer + 1)
    if among is None and on_host(x, valid):
        return _draws_on_host(x, start, evidence, valid)
    state = torch.full((x.shape[0],), start, dtype=torch.int64, device=x.device)
    for part in _content(x, valid if among is None else among, evidence).unbind(1):
        state = scramble(state ^ (part & _BITS))
    place = torch.arange(1, x.shape[1] + 1, device=state.device) if among is None else among.long().cumsum(1)
    return (scramble(state.unsqueeze(1) ^ scramble(place)) >> 8).float()


def _content(x: Tensor, there: Tensor | None, evidence: BaseEvidence | CacheEvidence) -> Tensor:
    """(B,4) int64: rounded channel means that tell samples apart."""
    mean, power = _moments(x, there)
    share = mean / power.sqrt().clamp(min=1e-12).unsqueeze(1)
    # The power is NaN where any feature is; without this check a NaN elsewhere would go unnoticed.
    share = finite(torch.where(power.isnan().unsqueeze(1), power.unsqueeze(1), share), evidence)
    return (share * _STEPS).round().clamp(-(2**20), 2**20).long()


def _moments(x: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,4) means of the first channels and (B,) the mean square of all, over the tokens that are there."""
    x = x.detach().float()
    if there is None:
        return x[:, :, :_CHANNELS].mean(1), x.square().mean((1, 2))
    tokens = there.sum(1, keepdim=True).clamp(min=1)
    x = torch.where(there.unsqueeze(-1), x, 0.0)
    return x[:, :, :_CHANNELS].sum(1) / tokens, x.square().sum((1, 2)) / (tokens.squeeze(1) * x.shape[2])


def _draws_on_host(x: Tensor, start: int, evidence: BaseEvidence | CacheEvidence, valid: Tensor | None) -> Tensor:
    """:func:`draws` in numpy, by the same hash."""
    mean, power = (t.numpy() for t in _moments(x, valid))
    share = mean / np.maximum(np.sqrt(power), np.float32(1e-12))[:, None]
    if not_a_number(power) or not_a_number(share):
        refuse_nan(power + share.sum(1), evidence)
    content = (share * _STEPS).round().clip(-(2**20), 2**20).astype(np.int64) & _BITS
    state = np.full(len(content), start, np.int64)
    for part in content.T:
        state = scramble(state ^ part)
    return torch.from_numpy((scramble(state[:, None] ^ _places(x.shape[1])) >> 8).astype(np.float32))


@lru_cache(maxsize=512)
def _places(n: int) -> Any:
    """(n,) hashes of the places from 1 on."""
    made = scramble(np.arange(1, n + 1))
    made.setflags(write=False)
    return made


def scramble(h: Any) -> Any:
    """A 32-bit integer hash (xor-shift and multiply) in int64, where no product overflows; of a tensor or an array."""
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & _BITS
    return h ^ (h >> 16)


def mixed_seed(seed: int, *parts: int) -> int:
    """The same hash of Python integers, to start from."""
    h = (seed ^ (seed >> 32)) & _BITS
    for part in (0x9E3779B9, *parts):
        h ^= part & _BITS
        for _ in range(2):
            h = ((h ^ (h >> 16)) * 0x45D9F3B) & _BITS
        h ^= h >> 16
    return h


# -- equal distances ---------------------------------------------------------------------------------------------------
def spread(evidence: BaseEvidence, k: int, grid: tuple[int, ...] | None) -> Tensor:
    """(B,N) 1 for ``k`` tokens at equal distances, 0 for others; protected tokens and slots without a token do not
    count along.

    Of F tokens that may go, those at floor((i+1/2) F/k); where ``grid`` is that of all of them and has a
    :func:`sub_grid` of ``k``, its rows and columns instead, so that both directions are thinned alike.
    """
    device = evidence.x.device
    plain = not evidence.masked and evidence.valid is None
    if not plain:
        may_go = torch.ones(evidence.batch, evidence.n, dtype=torch.bool, device=device)
        for blocked in (evidence.fixed(), None if evidence.valid is None else ~evidence.valid):
            may_go = may_go if blocked is None else may_go & ~blocked
        rank = may_go.long().cumsum(1) - 1
        return (evenly(rank, k, may_go.sum(1, keepdim=True)) & may_go).float()
    p, free = evidence.prefix, evidence.free()
    chosen = regular(free, k, grid, device)
    return torch.cat([torch.zeros(p, device=device), chosen.float()]).expand(evidence.batch, -1)


def regular(n: int, k: int, grid: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """(n,) bool of ``k`` among ``n`` tokens at equal distances, as :func:`spread` has them; ``grid`` counts where it
    has ``n`` places."""
    small = None if grid is None or math.prod(grid) != n else sub_grid(grid, k)
    if small is None or grid is None:
        return evenly(torch.arange(n, device=device), k, n)
    rows, cols = (
        evenly(torch.arange(side, device=device), part, side) for side, part in zip(grid[-2:], small, strict=True)
    )
    return (rows.unsqueeze(1) & cols).flatten()


def evenly(rank: Tensor, k: int, total: int | Tensor) -> Tensor:
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


# -- grids and cells ---------------------------------------------------------------------------------------------------
def full_grid(evidence: VisualEvidence) -> tuple[int, ...] | None:
    """The grid that the tokens behind the prefix fill in raster order, or None where they fill none.

    Cutting off padding leaves a smaller grid of a view; plain evidence has a grid only where it was given.
    """
    n = evidence.n - evidence.prefix
    if not isinstance(evidence, ImageEvidence):
        return evidence.grid if evidence.grid is not None and math.prod(evidence.grid) == n else None
    place = evidence.place
    first = place.amin(0)
    rows, cols = (place.amax(0) - first + 1).tolist()
    at = torch.arange(n, device=place.device)
    raster = torch.stack([at // cols, at % cols], 1)
    return (rows, cols) if rows * cols == n and torch.equal(place - first, raster) else None


def cells(rows: Sequence[Sequence[int]], k: int, aspect: float = 1.0) -> list[tuple[range, list[int], int]]:
    """Cut a grid into ``k`` cells: bands of rows, the columns that each has, and into how many cells it is cut.

    ``rows`` are the columns of the tokens in each row, which may differ. The number of bands is the one whose cells
    come nearest to ``aspect`` (height by width; equally near: more bands) and which has room for ``k``; rows are shared
    out evenly among bands, and cells too, the first bands taking the rest. With ``k`` a whole number of square blocks
    that tile a grid, these blocks come out.

    >>> cells([range(4)] * 4, 4)
    [(range(0, 2), [0, 1, 2, 3], 2), (range(2, 4), [0, 1, 2, 3], 2)]
    >>> [(band, n) for band, _, n in cells([range(4)] * 3, 5)]
    [(range(0, 1), 3), (range(1, 3), 2)]
    """
    height, width = len(rows), sum(map(len, rows)) / len(rows)

    def skew(bands: int) -> tuple[float, int]:
        return round(abs(math.log(height * k / (bands * bands * width * aspect))), 9), -bands

    for bands in sorted(range(1, min(height, k) + 1), key=skew):
        cut = [range(i * height // bands, (i + 1) * height // bands) for i in range(bands)]
        columns = [sorted({c for r in band for c in rows[r]}) for band in cut]
        room = [len(c) for c in columns]
        if sum(room) >= k:
            return list(zip(cut, columns, share(k, room), strict=True))
    raise ValueError(f"{sum(map(len, rows))} tokens cannot be cut into {k} cells")


def cells_of(places: list[tuple[int, int]], k: int, aspect: float = 1.0) -> list[tuple[int, int]]:
    """Band and column of the cell of :func:`cells` that each token at ``places`` (row, column) lies in; ``k`` different
    pairs."""
    rows: dict[int, list[int]] = {}
    for r, c in sorted(places):
        rows.setdefault(r, []).append(c)
    at: dict[tuple[int, int], tuple[int, int]] = {}
    names = list(rows)
    for b, (band, columns, parts) in enumerate(cells(list(rows.values()), k, aspect)):
        column = {c: i * parts // len(columns) for i, c in enumerate(columns)}
        at.update({(names[i], c): (b, column[c]) for i in band for c in rows[names[i]]})
    return [at[place] for place in places]


def windows(evidence: VisualEvidence, k: int, bands: int, aspect: float = 1.0) -> Tensor:
    """(N,) 0-based window of every token behind the prefix when a video is cut into exactly ``k`` windows of time, rows
    and columns, numbered by their first tokens.

    Frames are shared out evenly among ``bands`` of time, windows too (the first bands take the rest, none more than a
    frame has tokens), and the grid of a frame is cut into :func:`cells` in every band. Raises ``ValueError`` for bands
    that have no room for ``k`` windows, and frames whose tokens share a place.
    """
    t, n = frames_of(evidence)
    places = [(r, c) for r, c in evidence.place[:n].tolist()]
    if len(set(places)) < n:
        raise ValueError(
            "windows need one token in a place of every frame: give Evidence(grid=(frames, rows, columns))"
        )
    if not 1 <= bands <= min(t, k) or k > bands * n:
        raise ValueError(f"{t} frames of {n} tokens cannot be cut into {k} windows in {bands} bands of time")
    sizes = share(k, [n] * bands)
    labels = {}
    for size in set(sizes):
        names = cells_of(places, size, aspect)
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        labels[size] = torch.tensor([number[name] for name in names], device=evidence.x.device)
    out, first = [], 0
    for i, size in enumerate(sizes):
        out.append((labels[size] + first).repeat((i + 1) * t // bands - i * t // bands))
        first += size
    return torch.cat(out)


def resampling(n: int, k: int, device: torch.device) -> Tensor:
    """(K,N) weights of an antialiased linear resampling from n to k <= n points, rows summing to one."""
    stretch = n / k
    centre = (torch.arange(k, device=device) + 0.5) * stretch
    distance = (torch.arange(n, device=device) + 0.5 - centre.unsqueeze(1)).abs()
    weights = (1 - distance / stretch).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
