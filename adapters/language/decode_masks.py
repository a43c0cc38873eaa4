"""Masks of calls on a cache that holds the prompt, for layers behind a cut.

The library makes masks by column, since the cache counts columns (:mod:`tokenreduce.adapters.language.cache`): causal
order, padding, windows, images whose tokens see each other, and what a caller asks for with a mask of its own. A layer
behind a cut gets its columns of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.masks import Masks, Shown, as_added, lowest_of
from tokenreduce.adapters.language.site import LayerCall

__all__ = ["columns_of_mask", "decode_mask", "flash_mask", "refuse_rows"]


def decode_mask(call: LayerCall, cut: Cut, window: int | None, implementation: str) -> Tensor | None:
    """The mask of a layer behind the ``cut`` for new tokens; that of the ``call`` is what the library passed.

    Raises ``ValueError`` for a mask that flash attention cannot take.
    """
    columns, shown, stock = call.columns, Shown.by(call.cache.layers[call.index], call.x.shape[1]), call.mask
    if "flash" in implementation:
        refuse_rows(call.forward, stock, implementation)
        return flash_mask(columns, cut, shown.past + shown.queries, shown.slots)
    key, made = (id(cut), id(stock), shown, window, implementation), call.forward.state.of(Masks).made
    if key not in made:
        if isinstance(stock, Tensor):
            here = columns.of_slots(call.index, shown.total).part(slice(shown.offset, None))
            mask: Tensor | None = columns_of_mask(stock, here, call.forward, call.cache, window)
        else:
            mask = causal_mask(columns, cut, shown, window)
            mask = as_added(mask, call.x) if mask is not None and implementation == "eager" else mask
        made[key] = mask
    return made[key]


def causal_mask(columns: Columns, cut: Cut, shown: Shown, window: int | None) -> Tensor | None:
    """(B,1,Q,S) bool: who sees what, None when everything may be seen. A ``window`` counts columns of the unreduced
    sequence, as the model would without us."""
    k, past, device = cut.k, shown.past, cut.columns.at.device
    near = window is None or columns.length + past - k < window
    if cut.seen is None and columns.real_behind is None and shown.queries == 1 and shown.slots == past + 1 and near:
        return None
    here = slice(shown.offset, None)
    slot = torch.arange(shown.offset, shown.total, device=device)
    row = past + torch.arange(shown.queries, device=device)[:, None]
    mask = _slots_seen(columns, cut, shown.total)[:, None, None, here] & (slot <= row)
    if window is not None:
        behind = torch.arange(columns.length, columns.length + max(shown.total - k, 0), device=device)
        column = torch.cat([cut.columns.at, behind.expand(len(cut.columns.at), -1)], 1)[:, None, None, here]
        mask = mask & (columns.length + row - k - column < window)
    return mask


def flash_mask(columns: Columns, cut: Cut, filled: int, slots: int) -> Tensor | None:
    """(B,F) padding mask for implementations that take no other, in prefill and decode; F ``filled`` of the S
    ``slots`` hold a token after this call. None when everything may be seen."""
    plain = cut.seen is None and columns.real_behind is None and slots == filled
    return None if plain else _slots_seen(columns, cut, filled)


def _slots_seen(columns: Columns, cut: Cut, total: int) -> Tensor:
    """(B,total) which slots may be attended to as far as padding goes: the prompt's, then those of new tokens."""
    at, behind = cut.columns.at, columns.real_behind
    parts = [torch.ones_like(at, dtype=torch.bool) if cut.seen is None else cut.seen]
    if behind is not None:
        parts.append(behind[:, : max(total - cut.k, 0)])
    known = torch.cat(parts, 1)
    return torch.cat([known, known.new_ones(len(at), max(total - known.shape[1], 0))], 1)


def refuse_rows(forward: Forward, stock: Any, implementation: str) -> None:
    """Raise ``ValueError`` for a mask with rows where flash attention computes."""
    if forward.masked and isinstance(stock, Tensor):
        raise ValueError(
            f"{implementation} takes no mask that says what every token sees; give a padding mask (batch, tokens), or "
            f"call model.set_attn_implementation('sdpa')"
        )


def columns_of_mask(
    stock: Tensor, columns: ColumnIndex, forward: Forward, cache: Any, window: int | None = None
) -> Tensor:
    """``stock`` (B or 1,1,Q,S) of consecutive columns, at ``columns`` (B,K); nobody sees what is not there.

    Raises ``ValueError`` for a mask that is wider than all columns.
    """
    width, total = stock.shape[3], forward.past + forward.new
    first = max(forward.past - window + 1, 0) if window is not None else 0
    if not any(hasattr(layer, "max_cache_len") for layer in cache.layers):  # the last column is the last token
        first = total - width
        if first < 0:
            raise ValueError(
                f"attention_mask has {width} columns for {total} tokens, cached ones and visual ones that were dropped "
                f"included; give one column per token"
            )
    at = columns.at - first
    there = columns.only((at >= 0) & (at < width)).real()
    full = stock.expand(len(at), -1, -1, -1)
    at = at.clamp(0, width - 1)[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1)
    return full.gather(3, at).masked_fill(~there[:, None, None, :], lowest_of(full))
