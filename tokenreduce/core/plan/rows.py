"""Rows of tensors along the token axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenreduce.core.constants import first_rows
from tokenreduce.core.readable import readable

__all__ = ["take", "take_each"]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B,N,...) at ``index`` (B,K) along the token axis."""
    if x.dim() == 2:
        return x.gather(1, index)
    if x.requires_grad:  # the backward of gather is much cheaper than that of index_select
        flat = x.flatten(2)
        out = flat.gather(1, index.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    else:  # copies whole rows, several times faster than gather on a CPU
        where = index if x.shape[0] == 1 else index + first_rows(x.shape[0], x.shape[1], index)
        out = x.flatten(0, 1).index_select(0, where.flatten())
    return out.view(*index.shape, *x.shape[2:])


def take_each(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """:func:`take` from several tensors (B,N,C), with the places counted once."""
    if any(t.dim() == 2 or t.requires_grad for t in tensors):
        return tuple(take(t, index) for t in tensors)
    b, n = tensors[0].shape[:2]
    where = (index if b == 1 else index + first_rows(b, n, index)).flatten()
    return tuple(t.flatten(0, 1).index_select(0, where).view(*index.shape, *t.shape[2:]) for t in tensors)


def add_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``base`` (B,K,C) plus ``rows`` (B,R,C) at ``index`` (B,R); where nothing else needs base, it is consumed."""
    k = base.shape[1]
    where = (index if base.shape[0] == 1 else index + first_rows(base.shape[0], k, index)).flatten()
    flat, rows = base.flatten(0, 1), rows.to(base.dtype).flatten(0, 1)  # adds whole rows, unlike scatter_add
    if base.requires_grad or rows.requires_grad or not readable(rows):
        return flat.index_add(0, where, rows).view_as(base)
    return flat.index_add_(0, where, rows).view_as(base)
