"""Density peaks clustering (DPC-KNN), shared by methods that merge clusters of tokens or of frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, descending, distances

__all__ = ["clusters", "leaders", "nearest", "peaks"]


def peaks(d: Tensor, k: int, out: Tensor | None = None) -> Tensor:
    """(B,T) log of density times isolation, from distances ``d`` (B,T,T); ``out`` (B,T) bool takes no part (-inf).

    A point's density is exp(-mean d^2 to its ``k`` nearest, itself included; at most all), its isolation the distance
    to the nearest denser point. Equally dense points count the lower index as the denser, where published code adds
    noise. The densest point has infinity; a duplicate of a denser one comes behind all others that are there.
    """
    if out is not None:
        d = d.masked_fill(out[:, :, None] | out[:, None], float("inf"))
    close = d.topk(min(k, d.shape[1]), largest=False).values
    there = ~close.isinf()
    squares = torch.where(there, close.square(), 0.0).sum(-1)
    density = -squares / there.sum(-1).clamp(min=1)
    rank = ascending(descending(density))
    denser = rank[:, None] < rank[:, :, None]
    # The densest token has none denser: infinity instead of the largest distance, it comes first either way.
    isolation = d.masked_fill(~denser, float("inf")).amin(-1)
    # A duplicate of a denser token scores zero: below every other token, above those that are not there.
    scores = torch.where(isolation == 0, torch.finfo(density.dtype).min, density + isolation.log())
    return scores if out is None else scores.masked_fill(out, float("-inf"))


def nearest(d: Tensor, centres: Tensor) -> Tensor:
    """(B,T) place in ``centres`` (B,K) of the nearest one of every point, from distances ``d`` (B,T,T); ties go to the
    first, and every centre belongs to itself."""
    b, t, k = d.shape[0], d.shape[1], centres.shape[1]
    group = d.gather(2, centres.unsqueeze(1).expand(-1, t, -1)).argmin(-1)
    return group.scatter(1, centres, torch.arange(k, device=d.device).expand(b, -1))


def clusters(x: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN of points ``x`` (B,T,C), by Euclidean distances over sqrt(C): the ``count`` centres (B,count) of the
    highest score, best first, and the place among them (B,T) of every point's nearest; see :func:`peaks`."""
    d = distances(x) / math.sqrt(x.shape[-1])
    centres = descending(peaks(d, k))[:, :count]
    return centres, nearest(d, centres)


def leaders(x: Tensor, count: int, k: int) -> Tensor:
    """(M,) index of the centre that every point of ``x`` (M,C) joins in ``count`` >= 1 clusters as of :func:`clusters`;
    its own where there are no more points. Of centres at the same distance the lower index counts."""
    if count >= x.shape[0]:
        return torch.arange(x.shape[0], device=x.device)
    d = distances(x[None]) / math.sqrt(x.shape[-1])
    centres = descending(peaks(d, k))[:, :count].sort(1).values
    return centres[0][nearest(d, centres)[0]]
