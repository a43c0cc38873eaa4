"""Sharing one budget over the layers of a language model, for every sample of a batch by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.core.budget import Keep, check_keep, check_share

__all__ = ["allot", "check_ratio", "total_of"]

#: Halvings of an interval until its ends are equal in double precision.
_STEPS = 120


def check_ratio(ratio: float | None, what: str, free: bool) -> None:
    """Raise ``ValueError`` for a ``ratio`` of all keys that goes, as authors' codes count, outside [0, 1], or beside
    another budget; ``free`` says that ``keep`` was not given."""
    if ratio is None:
        return
    check_share(ratio, "ratio")
    if what != "all" or not free:
        raise ValueError(
            "ratio is the share of all keys that goes (a paper's r may be the share that stays): give it with what=all "
            "and without keep, or keep alone, which is the share that stays"
        )


def total_of(keep: Keep, counts: Tensor) -> Tensor:
    """(B,1) keys that stay in all layers together, of ``counts`` (B,L) that there are: a count is one for each layer on
    average, a ratio is rounded half up."""
    check_keep(keep)
    if isinstance(keep, int):
        return counts.clamp(max=keep).sum(1, keepdim=True)
    whole = counts.sum(1, keepdim=True)
    return torch.minimum((keep * whole.double() + 0.5).long(), whole)


def allot(weights: Tensor, total: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B,L) whole numbers that sum to ``total`` (B,1), in proportion to ``weights`` (B,L) and between ``low`` and
    ``high`` (B,L).

    What a bound cuts off goes to the others in proportion; fractions by largest remainder, ties to the first. Equal
    shares where all weights are 0. Where the bounds do not allow the total, the nearest one that they do.
    """
    low, high = torch.minimum(low, high), high
    total = total.maximum(low.sum(1, keepdim=True)).minimum(high.sum(1, keepdim=True))
    w = weights.double().clamp(min=0)
    mean = w.mean(1, keepdim=True)
    w = torch.where(mean > 0, w / mean, 1.0).clamp(min=1e-9)
    # Shares are min(max(f * w, low), high); the factor f is where they sum to the total.
    below = torch.zeros_like(mean)
    above = (high.amax(1, keepdim=True).double() + 1) / w.amin(1, keepdim=True)
    for _ in range(_STEPS):
        factor = (below + above) / 2
        enough = (w * factor).clamp(low.double(), high.double()).sum(1, keepdim=True) >= total
        below, above = torch.where(enough, below, factor), torch.where(enough, factor, above)
    share = (w * above).clamp(low.double(), high.double())
    out = (share + 1e-7).long()
    left = total - out.sum(1, keepdim=True)
    rest = ((share - out) * 1e6).round().masked_fill(out >= high, -1.0)
    order = rest.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(w.shape[1], device=w.device).expand_as(order))
    return out + (rank < left).long()
