"""Hooks on the call at which columns go: a prompt comes in and leaves shorter, later calls are read as of the caller's.

Outside of the call, the cache counts the columns that the caller gave, dropped ones included
(:mod:`tokenreduce.adapters.language.cache`), since the library slices ids and makes positions and masks by it. Inside,
it counts what it holds, since the model makes its own masks by that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.batching import is_paged
from tokenreduce.adapters.language.cache import forget_generation, keep_generation
from tokenreduce.adapters.language.entered import Entered, entered
from tokenreduce.adapters.language.generation import Forward, Generation, attach_generation, cache_in, generation_of
from tokenreduce.adapters.language.generic.entry import Begun, Setting, begin, positions_of
from tokenreduce.adapters.language.generic.masks import turn_mask
from tokenreduce.adapters.language.given import say_late
from tokenreduce.adapters.language.labels import note_kept
from tokenreduce.adapters.language.prompt import check_methods, check_turn

__all__ = ["enter", "guard", "leave"]


def enter(
    site: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, inner: Any, setting: Setting
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook: the arguments of the call, with what is left of the prompt."""
    given = dict(inspect.signature(type(site).forward).bind(site, *args, **kwargs).arguments)
    given.pop("self", None)
    given.update(given.pop("kwargs", {}))
    cache = cache_in(given)
    if cache is not None and is_paged(cache):
        entered.set(Entered(site, None, None))
        return None
    if cache is not None and int(cache.get_seq_length()):
        begun = _on_cache(inner, given, cache, setting)
    else:
        if cache is not None:
            forget_generation(cache)
        if given.get("input_ids") is None:
            raise ValueError(
                f"{type(site).__name__} was given inputs_embeds without input_ids, by which visual tokens are known in "
                f"a discovered model; pass input_ids with pixels, or with mm_encoder_outputs of get_image_features"
            )
        begun = begin(inner, given, setting)
    entered.set(Entered(site, cache, begun.forward, begun.answers))
    return (), begun.given


def _on_cache(inner: Any, given: dict[str, Any], cache: Any, setting: Setting) -> Begun:
    """A call on a cache that holds something."""
    generation, ids = generation_of(cache), given.get("input_ids")
    if ids is not None and any(bool((ids == i).any()) for i in setting.ids.values()) and _brings(inner, given):
        say_late(setting.methods, generation is not None)
    if generation is None:
        return Begun(given)
    check_methods(generation, setting.methods)
    begun = _later(inner, given, generation, cache, setting)
    forget_generation(cache)
    attach_generation(cache, generation)
    return begun


def _brings(inner: Any, given: dict[str, Any]) -> bool:
    """Whether a call brings features or pixels."""
    ready = given.get("mm_encoder_outputs") or {}
    return any(v is not None for v in ready.values()) or any(
        v is not None for n, v in given.items() if n.startswith("pixel_values")
    )


def _later(inner: Any, given: dict[str, Any], generation: Generation, cache: Any, setting: Setting) -> Begun:
    """A call on a cache that holds the prompt, whose columns are the caller's."""
    columns, shift, past = generation.columns, generation.positions.shift, int(cache.get_seq_length())
    tokens: Any = given.get("inputs_embeds")
    tokens = given.get("input_ids") if tokens is None else tokens
    new, mask = tokens.shape[1], given.get("attention_mask")
    generation.positions.given = past + new
    forward = Forward.behind(generation, new, past, cache)
    if columns.cut_at(-1) is None:
        return Begun(given, forward)
    columns.check_batch(tokens.shape[0])
    if isinstance(mask, Tensor) and mask.dim() == 2:
        check_turn(mask, past + new, new)
    static = any(hasattr(layer, "max_cache_len") for layer in cache.layers)
    out = {**given, "attention_mask": turn_mask(mask, columns, new, past, static)}
    if setting.positions:
        ids = positions_of(inner, given, torch.arange(past, past + new, device=tokens.device))
        out["position_ids"] = ids if shift is None else ids - shift.to(ids.device)
    return Begun(out, forward)


def leave(site: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook behind the call, and behind errors in it: the cache belongs to its generation and counts columns again."""
    call = entered.get()
    entered.set(None)
    if call is None or call.site is not site or call.forward is None:
        return
    if call.forward.prefill and output is not None:
        note_kept(site, output, call.forward.columns)
    cache = call.cache
    if cache is None and output is not None and hasattr(output, "items"):
        found = [output[n] for n in ("cache", "past_key_values") if n in output]
        cache = found[0] if found else None
    if cache is not None and call.forward.columns.cuts and hasattr(cache, "get_seq_length"):
        keep_generation(cache, call.forward.generation)


def guard(text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, site: Any) -> None:
    """Pre-hook on the language model: a prompt that came past the call at which columns go would not be reduced."""
    call, cache = entered.get(), cache_in(kwargs)
    if call is not None or kwargs.get("inputs_embeds") is None:
        return
    if cache is not None and int(cache.get_seq_length()):
        return
    raise ValueError(
        f"{type(text).__name__} was given merged embeddings past {type(site).__name__}, where tokens are reduced, so "
        f"that nothing would be; call {type(site).__name__} with input_ids, or take the patch off (tr.unpatch)"
    )
