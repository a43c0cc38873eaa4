"""Masks of calls on a cache whose keys partly left, for every KV head its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.decode_masks import columns_of_mask, refuse_rows
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.held import Held
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.masks import Shown, as_added
from tokenreduce.adapters.language.site import LayerCall

__all__ = ["held_mask"]


def held_mask(call: LayerCall, held: Held, window: int | None, implementation: str, groups: int) -> Tensor | None:
    """The mask (B,heads,Q,S) of a layer for new tokens, on a cache whose keys partly left; that of the ``call`` is what
    the library passed. ``groups`` query heads share a KV head.

    Raises ``ValueError`` for what flash attention cannot be told.
    """
    forward, stock, x = call.forward, call.mask, call.x
    shown = Shown.by(call.cache.layers[call.index], x.shape[1])
    plain = held.columns.there is None and held.bias is None and call.columns.real_behind is None
    near = window is None or forward.past + shown.queries <= window
    if "flash" in implementation:
        refuse_rows(forward, stock, implementation)
        return None if plain else _flash(held, call.columns, shown, implementation)
    if not isinstance(stock, Tensor) and plain and near and shown.queries == 1:
        return None
    here = held.slots(shown.total).part(slice(shown.offset, None))
    if isinstance(stock, Tensor):
        mask = _columns_of(stock, here, forward, call.cache, window)
    else:
        mask = _causal(call.columns.without_padding(here), forward, window)
    if held.bias is not None:
        mask = _with_bias(mask, held.bias, x, shown)
    elif implementation == "eager":
        mask = as_added(mask, x)
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(groups, 1)


def _causal(here: ColumnIndex, forward: Forward, window: int | None) -> Tensor:
    """(B,H,Q,S) bool."""
    new = torch.arange(forward.past, forward.past + forward.new, device=here.at.device)[:, None]
    mask = here.at[:, :, None] <= new
    if here.there is not None:
        mask = mask & here.there[:, :, None]
    return mask if window is None else mask & (new - here.at[:, :, None] < window)


def _with_bias(mask: Tensor, bias: Tensor, x: Tensor, shown: Shown) -> Tensor:
    """``mask`` as one that is added to logits, with ``bias`` (B,H,K) of the first K slots."""
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    more = x.new_zeros(*bias.shape[:2], shown.total)
    more[..., : bias.shape[2]] = bias.to(x.dtype)
    out = x.new_zeros(sees.shape).expand(-1, bias.shape[1], -1, -1) + more[:, :, None, shown.offset :]
    return out.masked_fill(~sees, torch.finfo(x.dtype).min)


def _flash(held: Held, columns: Columns, shown: Shown, implementation: str) -> Tensor:
    here = held.slots(shown.past + shown.queries)
    if held.bias is not None or here.at.shape[1] > 1:
        raise ValueError(
            f"{implementation} takes no mask for each head, and here heads keep unequal numbers of keys; call "
            f"model.set_attn_implementation('sdpa'), or choose a method that keeps the same in every head"
        )
    return columns.without_padding(here).real()[:, 0]


def _columns_of(stock: Tensor, here: ColumnIndex, forward: Forward, cache: Any, window: int | None) -> Tensor:
    """``stock`` (B or 1,1,Q,S) of consecutive columns, at ``here`` (B,H,T)."""
    b, h = here.at.shape[:2]
    flat = ColumnIndex(here.at.flatten(0, 1), None if here.there is None else here.there.flatten(0, 1))
    full = stock.expand(b, -1, -1, -1).repeat_interleave(h, 0)
    mask = columns_of_mask(full, flat, forward, cache, window)
    return mask.view(b, h, *mask.shape[2:])
