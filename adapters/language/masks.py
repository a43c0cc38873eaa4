"""Attention masks of the columns that are left, and what merged tokens add to them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_sizes", "gather_mask", "lowest_of"]


def gather_mask(
    mask: Tensor | None, index: Tensor, valid: Tensor | None, slots: int, causal: bool = True, front: int = 0
) -> Tensor | None:
    """A prefill mask (B or 1,1,N,S) for the columns ``index`` (B,K); None stays None where it can. None means what
    the attention module makes of it: plain ``causal`` attention, or that every token sees every other.

    ``slots`` is the number of keys that the layer will see: K, or more for a static cache, whose empty slots stay
    hidden. The first ``front`` columns are in the cache already and have no rows. Slots that are not there (``valid``
    False) see themselves, so that no row is empty, and nobody else sees them.
    """
    b, k = index.shape
    q = k - front
    if mask is None:
        if valid is None:
            return None
        out = torch.ones(q, k, dtype=torch.bool, device=index.device)
        out = (out.tril(front) if causal else out).expand(b, 1, q, k)
    else:
        full = mask.expand(b, -1, -1, -1)
        own_rows = index[:, None, front:, None] - front
        rows = full.gather(2, own_rows.expand(-1, full.shape[1], -1, full.shape[3]))
        out = rows.gather(3, index[:, None, None, :].expand(-1, full.shape[1], q, -1))
    lowest = lowest_of(out)
    if slots > k:
        out = torch.cat([out, out.new_full((*out.shape[:3], slots - k), lowest)], 3)
    if valid is None:
        return out
    there = torch.ones(b, slots, dtype=torch.bool, device=index.device)
    there[:, :k] = valid
    hidden = ~there[:, None, None, :]
    own = hidden & torch.eye(k, slots, dtype=torch.bool, device=index.device)[front:]
    if out.dtype == torch.bool:
        return (out & ~hidden) | own
    return out.masked_fill(hidden, lowest).masked_fill(own, 0.0)


def lowest_of(mask: Tensor) -> bool | float:
    """What hides a key in a mask of this type."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def add_sizes(
    mask: Tensor | None, bias: Tensor, x: Tensor, slots: int, *, past: int = 0, offset: int = 0, causal: bool = True
) -> Tensor:
    """``mask`` (B or 1,1,Q,S), or what None stands for, as an additive one for ``x`` (B,Q,C), with ``bias`` (B,K) added
    to the first K slots of a cache; ``past`` slots were filled before, and the first of the S ``slots`` shown is
    ``offset``."""
    if mask is None:
        q = x.shape[1]
        mask = torch.ones(q, slots, dtype=torch.bool, device=x.device)
        mask = (mask.tril(past - offset) if causal else mask)[None, None]
    if mask.dtype == torch.bool:
        mask = x.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
    shown = torch.nn.functional.pad(bias[:, offset:], (0, max(slots - bias.shape[1] + offset, 0)))[:, :slots]
    # What is hidden stays the lowest number there is, and must not overflow below it.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return torch.where(hidden, mask, mask + shown[:, None, None].to(mask.dtype))
