"""The cache of a generation with dropped tokens: it counts columns for whoever asks it, and slots in its layers.

The library and the caller read from a cache how many tokens it has taken in: to slice what is new, to count positions,
to make masks, to take drafts back (``crop``). Layers behind a cut hold fewer. So the methods by which the cache as a
whole is asked answer in columns, as they would without us; layers, whose own methods attention calls, are left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Run, attach_run, run_of

__all__ = ["forget_run", "keep_run"]


def keep_run(cache: Any, run: Run) -> None:
    """Let ``cache`` belong to ``run`` from now on."""
    attach_run(cache, run)
    for name, asked in _ASKED.items():
        setattr(cache, name, functools.partial(asked, cache))


def forget_run(cache: Any) -> None:
    """Undo :func:`keep_run`, for a cache that was emptied and now takes another prompt."""
    attach_run(cache, None)
    for name in _ASKED:
        vars(cache).pop(name, None)


def seen(cache: Any, layer_idx: int = 0) -> Any:
    """``cache.get_seq_length``: columns that were given, dropped ones included."""
    slots, run = type(cache).get_seq_length(cache, layer_idx), run_of(cache)
    return slots if run is None or not int(slots) else run.columns(slots, _counting(cache, layer_idx))


def _counting(cache: Any, layer: int) -> int:
    """The layer whose length the cache tells when asked for that of ``layer``: the first one with a length, where that
    keeps a state instead of keys."""
    if hasattr(cache.layers[layer], "get_seq_length"):
        return layer
    return next(i for i, one in enumerate(cache.layers) if hasattr(one, "get_seq_length"))


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
    if run is not None:
        run.given = min(run.given, int(seen(cache)) + number if number <= 0 else number)
    if run is None or (number > 0 and "tokens_to_remove" in inspect.signature(type(cache).crop).parameters):
        type(cache).crop(cache, number)
        return
    past, again = int(seen(cache)), run.again
    left = max(past + number, 0) if number <= 0 else min(number, past)
    known = {} if again is None else {i: slots_before(run, i, columns, left) for i, columns in again.slots.items()}
    gone = []
    for i in range(len(cache.layers)):
        since = None if again is None else again.revived_at(i)
        if again is None or since is None:
            gone.append(run.slots_behind(i, left, past))
        else:
            gone.append(again.slots[since].shape[1] - known[since])
    for layer, n in zip(cache.layers, gone, strict=True):
        layer.crop(-n)
    if left < past:
        if again is not None:
            again.crop(left, known)
        run.crop(left)


def update(cache: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
    """``cache.update``. Raises ``ValueError`` for a model without our hooks, which would take slots for columns."""
    run = run_of(cache)
    if run is not None and run.reduced and layer_idx == 0 and not torch.compiler.is_compiling():
        held = int(type(cache).get_seq_length(cache, 0))
        if held and run.columns(held + keys.shape[2]) > run.given:
            raise ValueError(
                f"this cache holds a prompt that {run.methods} reduced, and this model is not patched with that (any "
                f"more); patch it as it was, or give the whole prompt again without the cache"
            )
    return type(cache).update(cache, keys, values, layer_idx, *args, **kwargs)


def reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    """``cache.reorder_cache``: what is remembered follows the beams, too."""
    type(cache).reorder_cache(cache, beam_idx)
    run = run_of(cache)
    if run is not None:
        run.reorder(beam_idx)


def slots_before(run: Run, layer: int, columns: Tensor, left: int) -> int:
    """How many slots of ``layer``, where tokens came back and which has ``columns`` (B,S), were filled when it held the
    first ``left`` columns. What came back with a later token goes with that, and may come back again."""
    new = ((columns >= run.length) & (columns < left)).any(0).nonzero()
    if len(new):
        return int(new[-1]) + 1
    cut = run.cut_at(layer)
    held = run.length if cut is None else cut.index.shape[1]
    return held - (run.slots_behind(layer, left, run.length) if left < run.length else 0)


_ASKED: dict[str, Callable[..., Any]] = {
    "get_seq_length": seen,
    "get_mask_sizes": mask_sizes,
    "crop": crop,
    "update": update,
    "reorder_cache": reorder_cache,
}
