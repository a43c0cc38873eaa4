"""Masks of calls on a cache that holds the prompt, for layers behind a cut.

The library makes masks by column, since the cache counts columns (:mod:`tokenreduce.adapters.language.cache`): causal
order,
padding, windows, images whose tokens see each other, and what a caller asks for with a mask of its own. A layer behind
a cut gets its columns of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Step
from tokenreduce.adapters.language.masks import lowest_of

__all__ = ["columns_of_mask", "later_mask"]


def later_mask(
    stock: Any, x: Tensor, step: Step, index: int, cache: Any, window: int | None, implementation: str
) -> Tensor | None:
    """The mask of decoder layer ``index`` for ``x`` (B,Q,C), new tokens; ``stock`` is what the library passed.

    Raises ``ValueError`` for a mask that flash attention cannot take.
    """
    run, mine, queries = step.run, cache.layers[index], x.shape[1]
    past = int(mine.get_seq_length())
    slots, offset = mine.get_mask_sizes(queries)
    if "flash" in implementation:
        if step.masked and isinstance(stock, Tensor):
            raise ValueError(
                f"{implementation} takes no mask that says what every token sees; give a padding mask (batch, tokens), "
                f"or call model.set_attn_implementation('sdpa')"
            )
        return run.flash_mask(index, past + queries, slots)
    key = (id(run.cut_at(index)), id(stock), past, slots, offset, window, implementation)
    if key not in step.masks:
        if isinstance(stock, Tensor):
            columns, there = (t[:, offset:] for t in run.slot_columns(index, offset + slots))
            mask: Tensor | None = columns_of_mask(stock, columns, there, step, cache, window)
        else:
            mask = run.decode_mask(index, past, queries, slots, offset, window)
            if mask is not None and implementation == "eager":
                mask = x.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
        step.masks[key] = mask
    return step.masks[key]


def columns_of_mask(
    stock: Tensor, columns: Tensor, there: Tensor, step: Step, cache: Any, window: int | None = None
) -> Tensor:
    """``stock`` (B or 1,1,Q,S) of consecutive columns, at ``columns`` (B,K); nobody sees what is not ``there``.

    Raises ``ValueError`` for a mask that is wider than all columns.
    """
    width, total = stock.shape[3], step.past + step.new
    first = max(step.past - window + 1, 0) if window is not None else 0
    if not any(hasattr(layer, "max_cache_len") for layer in cache.layers):  # the last column is the last token
        first = total - width
        if first < 0:
            raise ValueError(
                f"attention_mask has {width} columns for {total} tokens, cached ones and visual ones that were dropped "
                f"included; give one column per token"
            )
    at = columns - first
    there = there & (at >= 0) & (at < width)
    full = stock.expand(len(columns), -1, -1, -1)
    at = at.clamp(0, width - 1)[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1)
    return full.gather(3, at).masked_fill(~there[:, None, None, :], lowest_of(full))
