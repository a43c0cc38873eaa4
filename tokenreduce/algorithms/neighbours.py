"""Nearest neighbours of tokens that went among those that stayed."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, highest, inner
from tokenreduce.core.plan import Prune, take
from tokenreduce.core.readable import readable

__all__ = ["nearest_slots"]

#: Rows of distances that are held at a time.
_ROWS = 1024


def nearest_slots(x: Tensor, kept: Prune, out: Tensor | None, k: int) -> Tensor:
    """(B,N,k) slots of the ``k`` nearest tokens among those that a plan keeps, for every token that it drops, by
    Euclidean distance of ``x`` (B,N,C) in float32. Of equal distances the lower slot counts. What tokens that stay get
    has no meaning; -1 stands where a sample of a plan with validity has fewer than ``k``, which are at most those that
    the others keep. ``out`` (B,K) bool marks slots that are nobody's neighbours.
    """
    n, slots = x.shape[1], kept.k
    x = x - x.mean(1, keepdim=True)  # large common components would cost the small distances their digits
    ys = take(x, kept.keep)
    absent = out if kept.valid is None else ~kept.valid if out is None else out | ~kept.valid
    power = ys.square().sum(-1)
    if absent is not None:
        power = power.masked_fill(absent, float("inf"))
    stay = kept.sources() >= 0
    gone = ascending(stay.long())[:, : n - slots if kept.valid is None else n]
    found = []
    for rows in gone.split(_ROWS, 1):
        far = power.unsqueeze(1) - 2 * inner(take(x, rows), ys)  # less the token's own square, which is in all of them
        near = _smallest(far, k)
        if kept.valid is not None:
            near = near.masked_fill(far.gather(2, near).isinf(), -1)
        found.append(near)
    near = torch.cat(found, 1)
    return near.new_zeros(x.shape[0], n, k).scatter(1, gone.unsqueeze(-1).expand(-1, -1, k), near)


def _smallest(far: Tensor, k: int) -> Tensor:
    """(B,R,k) indices of the ``k`` smallest of every row of (B,R,K), ties to the lower index, in some order."""
    if far.device.type != "cpu" or not readable(far):  # a number of hits is asked of a device, which waits for it
        return ascending(far)[..., :k]
    return highest(-far, k).nonzero()[:, -1].view(*far.shape[:-1], k)
