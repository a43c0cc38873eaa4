"""Attention masks of the columns that are left, and what merged tokens add to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.state import Record

__all__ = ["Masks", "Shown", "add_sizes", "as_added", "gather_mask", "lowest_of"]


@dataclass
class Masks(Record):
    """Masks that are made, for the layers of a forward that need the same."""

    made: dict[Any, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """What the cache of a layer shows to a call that brings ``queries`` tokens: ``slots``, filled or not, the first of
    which is number ``offset`` (sliding caches forget); ``past`` of all were filled before."""

    queries: int
    slots: int
    past: int = 0
    offset: int = 0

    @staticmethod
    def by(cache_layer: Any, queries: int) -> Shown:
        past, sizes = int(cache_layer.get_seq_length()), cache_layer.get_mask_sizes(queries)
        return Shown(queries, sizes[0], past, sizes[1])

    @property
    def total(self) -> int:
        """Slots up to the last one that is shown."""
        return self.offset + self.slots


def gather_mask(
    mask: Tensor | None, columns: ColumnIndex, slots: int, causal: bool = True, front: int = 0
) -> Tensor | None:
    """A prefill mask (B or 1,1,N,S) for ``columns`` (B,K); None stays None where it can. None means what the attention
    module makes of it: plain ``causal`` attention, or that every token sees every other.

    ``slots`` is the number of keys that the layer will see: K, or more for a static cache, whose empty slots stay
    hidden. The first ``front`` columns are in the cache already and have no rows. Slots that are not there see
    themselves, so that no row is empty, and nobody else sees them.
    """
    index, valid = columns.at, columns.there
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


def as_added(mask: Tensor, x: Tensor) -> Tensor:
    """A bool ``mask`` as one that is added to logits of the type of ``x``; others are that already."""
    return x.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min) if mask.dtype == torch.bool else mask


def add_sizes(mask: Tensor | None, bias: Tensor, x: Tensor, shown: Shown, causal: bool = True) -> Tensor:
    """``mask`` (B or 1,1,Q,S), or what None stands for, as an additive one for ``x`` (B,Q,C), with ``bias`` (B,K) added
    to the first K slots of a cache."""
    slots, offset = shown.slots, shown.offset
    if mask is None:
        q = x.shape[1]
        mask = torch.ones(q, slots, dtype=torch.bool, device=x.device)
        mask = (mask.tril(shown.past - offset) if causal else mask)[None, None]
    mask = as_added(mask, x)
    more = torch.nn.functional.pad(bias[:, offset:], (0, max(slots - bias.shape[1] + offset, 0)))[:, :slots]
    # What is hidden stays the lowest number there is, and must not overflow below it.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return torch.where(hidden, mask, mask + more[:, None, None].to(mask.dtype))
