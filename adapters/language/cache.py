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

from tokenreduce.adapters.language.generation import Generation, attach_generation, generation_of

__all__ = ["forget_generation", "keep_generation"]


def keep_generation(cache: Any, generation: Generation) -> None:
    """Let ``cache`` belong to ``generation`` from now on."""
    attach_generation(cache, generation)
    for name, asked in _ASKED.items():
        setattr(cache, name, functools.partial(asked, cache))


def forget_generation(cache: Any) -> None:
    """Undo :func:`keep_generation`, for a cache that was emptied and now takes another prompt."""
    attach_generation(cache, None)
    for name in _ASKED:
        vars(cache).pop(name, None)


def seen(cache: Any, layer_idx: int = 0) -> Any:
    """``cache.get_seq_length``: columns that were given, dropped ones included."""
    slots, generation = type(cache).get_seq_length(cache, layer_idx), generation_of(cache)
    if generation is None or not int(slots):
        return slots
    return generation.columns.given(slots, _counting(cache, layer_idx))


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
    generation = generation_of(cache)
    if generation is not None:
        positions = generation.positions
        positions.given = min(positions.given, int(seen(cache)) + number if number <= 0 else number)
    if generation is None or (number > 0 and "tokens_to_remove" in inspect.signature(type(cache).crop).parameters):
        type(cache).crop(cache, number)
        return
    past = int(seen(cache))
    left = max(past + number, 0) if number <= 0 else min(number, past)
    gone = [generation.columns.slots_behind(i, left, past) for i in range(len(cache.layers))]
    for layer, n in zip(cache.layers, gone, strict=True):
        layer.crop(-n)
    if left < past:
        generation.crop(left)


def update(cache: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
    """``cache.update``. Raises ``ValueError`` for a model without our hooks, which would take slots for columns."""
    generation = generation_of(cache)
    if generation is not None and layer_idx == 0 and not torch.compiler.is_compiling():
        check_given(cache, generation, keys.shape[2])
    return type(cache).update(cache, keys, values, layer_idx, *args, **kwargs)


def check_given(cache: Any, generation: Generation, new: int) -> None:
    """Raise ``ValueError`` for ``new`` tokens of which no hook of ours knows."""
    columns = generation.columns
    held = int(type(cache).get_seq_length(cache, 0)) if columns.reduced else 0
    if held and columns.given(held + new) > generation.positions.given:
        raise ValueError(
            f"this cache holds a prompt that {columns.chosen_by} reduced, and this model is not patched with that (any "
            f"more); patch it as it was, or give the whole prompt again without the cache"
        )


def reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    """``cache.reorder_cache``: what is remembered follows the beams, too."""
    type(cache).reorder_cache(cache, beam_idx)
    generation = generation_of(cache)
    if generation is not None:
        generation.reorder(beam_idx)


_ASKED: dict[str, Callable[..., Any]] = {
    "get_seq_length": seen,
    "get_mask_sizes": mask_sizes,
    "crop": crop,
    "update": update,
    "reorder_cache": reorder_cache,
}
