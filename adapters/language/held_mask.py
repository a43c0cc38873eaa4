"""Masks of calls on a cache whose keys partly left, for every KV head its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Run, Step
from tokenreduce.adapters.language.held import Held
from tokenreduce.adapters.language.later import columns_of_mask

__all__ = ["held_mask", "slots_of"]


def slots_of(run: Run, layer: int, total: int) -> tuple[Tensor, Tensor]:
    """``(columns, there)``, (B,H,T) each, of the first ``total`` slots of ``layer``, whatever left it; padding is not
    there."""
    held, cut = run.held.get(layer), run.cut_at(layer)
    if held is not None:
        columns, there = held.slots(total)
    elif cut is not None:
        columns, there = (t.unsqueeze(1) for t in run.slot_columns(layer, total))
    else:
        columns = torch.arange(total, device=run.visual.device).expand(len(run.visual), 1, -1)
        there = torch.ones_like(columns, dtype=torch.bool)
    return columns, there & real_columns(run, columns)


def real_columns(run: Run, columns: Tensor) -> Tensor:
    """(B,H,T) bool: which of the ``columns`` are no padding, of the prompt or of a later turn."""
    b = len(run.visual)
    parts = [torch.ones_like(run.visual) if run.mask is None else run.mask]
    parts += [] if run.later is None else [run.later]
    known = torch.cat([*parts, torch.ones(b, 1, dtype=torch.bool, device=run.visual.device)], 1)
    at = columns.clamp(max=known.shape[1] - 1)
    return known.gather(1, at.flatten(1)).view_as(columns)


def held_mask(
    held: Held, stock: Any, x: Tensor, step: Step, index: int, cache: Any, window: int | None, name: str, groups: int
) -> Tensor | None:
    """The mask (B,heads,Q,S) of decoder layer ``index`` for ``x`` (B,Q,C), new tokens, on a cache whose keys partly
    left; ``stock`` is what the library passed, ``name`` the implementation, ``groups`` query heads per KV head.

    Raises ``ValueError`` for what flash attention cannot be told.
    """
    run, mine, q = step.run, cache.layers[index], x.shape[1]
    past = int(mine.get_seq_length())
    slots, offset = mine.get_mask_sizes(q)
    plain = held.there is None and held.bias is None and run.later is None
    near = window is None or step.past + q <= window
    if "flash" in name:
        return _flash(held, stock, step, plain, past + q, name)
    if not isinstance(stock, Tensor) and plain and near and q == 1:
        return None
    columns, there = held.slots(offset + slots)
    columns, there = columns[..., offset:], there[..., offset:]
    if isinstance(stock, Tensor):
        mask = _columns_of(stock, columns, there, step, cache, window)
    else:
        new = torch.arange(step.past, step.past + q, device=x.device)[:, None]
        mask = (there & real_columns(run, columns))[:, :, None] & (columns[:, :, None] <= new)
        if window is not None:
            mask = mask & (new - columns[:, :, None] < window)
    if held.bias is not None or (name == "eager" and mask.dtype == torch.bool):
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        lowest = torch.finfo(x.dtype).min
        mask = x.new_zeros(sees.shape)
        if held.bias is not None:
            bias = x.new_zeros(*held.bias.shape[:2], offset + slots)
            bias[..., : held.k] = held.bias.to(x.dtype)
            mask = mask.expand(-1, bias.shape[1], -1, -1) + bias[:, :, None, offset:]
        mask = mask.masked_fill(~sees, lowest)
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(groups, 1)


def _flash(held: Held, stock: Any, step: Step, plain: bool, filled: int, name: str) -> Tensor | None:
    if step.masked and isinstance(stock, Tensor):
        raise ValueError(
            f"{name} takes no mask that says what every token sees; give a padding mask (batch, tokens), or call "
            f"model.set_attn_implementation('sdpa')"
        )
    if plain:
        return None
    columns, there = held.slots(filled)
    if held.bias is not None or columns.shape[1] > 1:
        raise ValueError(
            f"{name} takes no mask for each head, and here heads keep unequal numbers of keys; call "
            f"model.set_attn_implementation('sdpa'), or choose a method that keeps the same in every head"
        )
    return (there & real_columns(step.run, columns))[:, 0]


def _columns_of(stock: Tensor, columns: Tensor, there: Tensor, step: Step, cache: Any, window: int | None) -> Tensor:
    """``stock`` (B or 1,1,Q,S) of consecutive columns, at ``columns`` (B,H,T)."""
    b, h = columns.shape[:2]
    flat = columns_of_mask(
        stock.expand(b, -1, -1, -1).repeat_interleave(h, 0), columns.flatten(0, 1), there.flatten(0, 1), step, cache,
        window,
    )  # fmt: skip
    return flat.view(b, h, *flat.shape[2:])
