"""What happens in front of a decoder layer: in prefill a plan and what runs along columns, in decode the mask.

Rotary tables reach the layers ready (M-RoPE mixed, one pair per layer type), so that layers need no position ids behind
a cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, is_causal
from tokenreduce.adapters.language.ahead import look_ahead
from tokenreduce.adapters.language.cache import keep_run
from tokenreduce.adapters.language.decode import set_aside
from tokenreduce.adapters.language.decoders import (
    check_implementation,
    ids_left,
)
from tokenreduce.adapters.language.generation import (
    KEYWORD,
    Cut,
    Deep,
    Step,
    cache_in,
    gather_mask,
    rows_of,
    run_of,
)
from tokenreduce.adapters.language.later import later_mask
from tokenreduce.adapters.language.middle import is_middle, taken
from tokenreduce.adapters.language.reduce import reduce_before
from tokenreduce.core.reducer import Reducer

__all__ = ["enter", "take_deep"]


def take_deep(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on a language model with DeepStack: it adds its features to all visual columns, so those that come
    after layer ``first`` (0 where columns go before the language model) or a later one are added by us, to the columns
    that are left."""
    step: Step | None = kwargs.get(KEYWORD)
    features = kwargs.get("deepstack_visual_embeds")
    if step is None or not step.prefill or features is None:
        return None
    first = first if step.run.cut_at(-1) is None else 0
    if len(features) <= first:
        return None
    mine = {i + 1: features[i] for i in range(first, len(features))}
    deep = Deep(kwargs["visual_pos_masks"], mine)
    return args, {**kwargs, "deepstack_visual_embeds": features[:first], KEYWORD: replace(step, deep=deep)}


def enter(
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    index: int,
    depth: int,
    reducer: Reducer | None,
    reads: bool,
    later: bool,
    window: int | None,
    norm: nn.Module | None = None,
    plain: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on decoder layer ``index``: plan and gather in prefill, rebuild the mask in decode. ``reads`` and
    ``later`` are whether the next layer's method looks at this one's attention in prefill and in decode; with
    ``plain``, a method that looks ahead gets queries and keys before their rotation."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        return None
    run, cache = step.run, cache_in(kwargs)
    kwargs = dict(kwargs)
    if not step.prefill:
        records = later and step.new == 1
        if CALL in kwargs or (run.cut_at(index) is None and not records):
            return None
        if run.cut_at(index) is not None:
            run.check_batch(args[0].shape[0])
            name = check_implementation(layer, index, window)
            kwargs["attention_mask"] = later_mask(
                kwargs.get("attention_mask"), args[0], step, index, cache, window, name
            )
        if records:
            run.calls[index] = kwargs[CALL] = Call(kwargs.get("attention_mask"), record=True)
        return args, kwargs
    if cache is not None and run_of(cache) is not run:
        keep_run(cache, run)
    x, entry = args[0], run.cut_at(-1)
    if index == 0 and entry is not None:
        x = rows_of(x, entry.local)
    middle = is_middle(reducer, index)
    if middle and (left := taken(run, index)) is not None:
        x = left
    if step.deep is not None:
        x = step.deep.add(x, index, run.cut_at(index if middle else index - 1))
    if reducer is not None and not middle:
        ahead = "ahead" in reducer.gathers() and index not in run.decided
        with torch.no_grad():
            flash = "flash" in check_implementation(layer, index, window)
            call = look_ahead(layer, x, run, index, kwargs, flash, plain) if ahead else run.calls.pop(index - 1, None)
        whole = x
        x = reduce_before(x, run, index, depth, reducer, layer, call, norm, plain)
        dropped = run.cut_at(index)
        if cache is not None and reducer.later() == "revive" and dropped is not None and dropped.layer == index:
            set_aside(run, index, whole, kwargs["position_embeddings"], cache)
    cut_here = run.cut_at(index)
    if cut_here is not None:
        name = check_implementation(layer, index, window)
        kwargs["position_embeddings"] = _tables(step, cut_here, kwargs["position_embeddings"])
        kwargs["position_ids"] = ids_left(layer, kwargs.get("position_ids"), cut_here.here)
        slots = x.shape[1] if cache is None else cache.layers[index].get_mask_sizes(x.shape[1])[0]
        if "flash" in name:
            kwargs["attention_mask"] = run.flash_mask(index, run.front + x.shape[1], slots)
        else:
            mask, causal = kwargs.get("attention_mask"), is_causal(layer.self_attn)
            made, key = step.masks, (id(cut_here), id(mask), slots, causal)
            if key not in made:
                made[key] = gather_mask(mask, cut_here.index, cut_here.valid, slots, causal, run.front)
            kwargs["attention_mask"] = made[key]
    if reads and index + 1 not in run.decided:
        run.calls[index] = kwargs[CALL] = Call(kwargs.get("attention_mask"), record=True)
    return (x, *args[1:]), kwargs


def _tables(step: Step, cut: Cut, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables of the columns that are left; gathered once for the layers that share them."""
    key = (id(cut), *map(id, tables))
    if key not in step.tables:
        # The stock tables are held as well, so that no other can get their ids while they are a key.
        step.tables[key] = (tables, tuple(rows_of(t, cut.here) for t in tables))
    return step.tables[key][1]
