"""The cache of a generation with dropped tokens: it counts columns for whoever asks it, and slots in its layers.

The library and the caller read from a cache how many tokens it has taken in: to slice what is new, to count positions,
to make masks, to take drafts back (``crop``). Layers behind a cut hold fewer. So the methods by which the cache as a
whole is asked answer in columns, as they would without us; layers, whose own methods attention calls, are left alone.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.generation import Run, attach_run, run_of
from tokenreduce.adapters.vlm_decode import follow_beams

__all__ = ["forget_run", "keep_run"]


def keep_run(cache: Any, run: Run) -> None:
    """Let ``cache`` belong to ``run`` from now on."""
    attach_run(cache, run)
    if run.again is not None:
        follow_beams(cache, run)
    for name, asked in (("get_seq_length", seen), ("get_mask_sizes", mask_sizes), ("crop", crop)):
        setattr(cache, name, functools.partial(asked, cache))


def forget_run(cache: Any) -> None:
    """Undo :func:`keep_run`, for a cache that was emptied and now takes another prompt."""
    attach_run(cache, None)
    for name in ("get_seq_length", "get_mask_sizes", "crop"):
        vars(cache).pop(name, None)


def seen(cache: Any, layer_idx: int = 0) -> Any:
    """``cache.get_seq_length``: columns that were given, dropped ones included."""
    slots, run = type(cache).get_seq_length(cache, layer_idx), run_of(cache)
    return slots if run is None or not int(slots) else run.columns(slots, layer_idx)


def mask_sizes(cache: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
    """``cache.get_mask_sizes``: length and first column of the mask that a layer which dropped nothing would need."""
    length, offset = type(cache).get_mask_sizes(cache, query_length, layer_idx)
    slots = type(cache).get_seq_length(cache, layer_idx)
    past = seen(cache, layer_idx)
    if past is slots or not int(past - slots):
        return length, offset
    layer, past = cache.layers[layer_idx], int(past)
    room = getattr(layer, "max_cache_len", 0)  # of static layers
    if getattr(layer, "is_sliding", False):
        offset = max(past - getattr(layer, "sliding_window", room) + 1, 0)
    return max(past + query_length - offset, room), offset


def crop(cache: Any, number: int) -> None:
    """``cache.crop``: take the last ``-number`` columns out of every layer.

    Releases that take a positive ``number`` mean how many columns are left. Raises ``ValueError`` where the rows of a
    batch hold unequal numbers of the columns that go.
    """
    run = run_of(cache)
    if run is None or (number > 0 and "tokens_to_remove" in inspect.signature(type(cache).crop).parameters):
        type(cache).crop(cache, number)
        return
    past, again = int(seen(cache)), run.again
    left = max(past + number, 0) if number <= 0 else min(number, past)
    since = [None if again is None else again.revived_at(i) for i in range(len(cache.layers))]
    gone = [run.slots_behind(i, left, past) if at is None else 0 for i, at in enumerate(since)]
    kept = {} if again is None else {i: slots_before(columns, left) for i, columns in again.slots.items()}
    for layer, at, n in zip(cache.layers, since, gone, strict=True):
        if at is None:
            layer.crop(-n)
        else:
            take = kept[at][0].clamp(min=0)[:, None, :, None]
            layer.keys, layer.values = (
                t.gather(2, take.to(t.device).expand(-1, t.shape[1], -1, t.shape[3])) for t in (layer.keys, layer.values)
            )
    if left == past:
        return
    if again is not None:
        again.slots = {i: columns for i, (_, columns) in kept.items()}
        again.earlier = {}  # what the step before saw is not known any more
    run.crop(left)


def slots_before(columns: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Slots (B,S) of those whose ``columns`` (B,N) are before ``left``, in their order, -1 in front where a row has
    fewer; and their columns."""
    slot = torch.arange(columns.shape[1], device=columns.device).masked_fill(columns >= left, -1)
    width = int((slot >= 0).sum(1).max())
    take = slot.sort(dim=1).values[:, columns.shape[1] - width :]
    return take, columns.gather(1, take.clamp(min=0)).masked_fill(take < 0, -1)
