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
from tokenreduce.adapters.language.cache import forget_run, keep_run
from tokenreduce.adapters.language.entered import Entered, entered
from tokenreduce.adapters.language.generation import Run, Step, attach_run, cache_in, run_of
from tokenreduce.adapters.language.generic.entry import Setting, begin, positions_of
from tokenreduce.adapters.language.generic.masks import later_mask
from tokenreduce.adapters.language.given import say_late
from tokenreduce.adapters.language.labels import note_kept
from tokenreduce.adapters.language.prompt import _check_methods, _check_turn

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
    past = 0 if cache is None else int(cache.get_seq_length())
    run = None if cache is None else run_of(cache)
    ids = given.get("input_ids")
    step: Step | None = None
    answers: dict[str, Any] = {}
    if past:
        images = ids is not None and any(bool((ids == i).any()) for i in setting.ids.values()) and _brings(inner, given)
        if images:
            say_late(setting.methods, run is not None)
        if run is not None:
            _check_methods(run, setting.methods)
            given, step = _later(inner, given, run, cache, past, setting)
            forget_run(cache)
            attach_run(cache, run)
    else:
        if cache is not None:
            forget_run(cache)
        if ids is None:
            raise ValueError(
                f"{type(site).__name__} was given inputs_embeds without input_ids, by which visual tokens are known in "
                f"a discovered model; pass input_ids with pixels, or with mm_encoder_outputs of get_image_features"
            )
        given, step, answers = begin(inner, given, setting)
    entered.set(Entered(site, cache, step, answers))
    return (), given


def _brings(inner: Any, given: dict[str, Any]) -> bool:
    """Whether a call brings features or pixels."""
    ready = given.get("mm_encoder_outputs") or {}
    return any(v is not None for v in ready.values()) or any(
        v is not None for n, v in given.items() if n.startswith("pixel_values")
    )


def _later(
    inner: Any, given: dict[str, Any], run: Run, cache: Any, past: int, setting: Setting
) -> tuple[dict[str, Any], Step]:
    """The arguments of a call on a cache that holds the prompt, whose columns are the caller's."""
    cut = run.cut_at(-1)
    tokens: Any = given.get("inputs_embeds")
    tokens = given.get("input_ids") if tokens is None else tokens
    new, mask = tokens.shape[1], given.get("attention_mask")
    run.given = past + new
    step = Step(run, prefill=False, new=new, past=past)
    if cut is None:
        return given, step
    run.check_batch(tokens.shape[0])
    if isinstance(mask, Tensor) and mask.dim() == 2:
        _check_turn(mask, past + new, new)
    static = any(hasattr(layer, "max_cache_len") for layer in cache.layers)
    out = {**given, "attention_mask": later_mask(mask, run, cut, new, past, static)}
    if setting.positions:
        ids = positions_of(inner, given, torch.arange(past, past + new, device=tokens.device))
        out["position_ids"] = ids if run.shift is None else ids - run.shift.to(ids.device)
    return out, step


def leave(site: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook behind the call, and behind errors in it: the cache belongs to its run and counts columns again."""
    call = entered.get()
    entered.set(None)
    if call is None or call.site is not site or call.step is None:
        return
    if call.step.prefill and output is not None:
        note_kept(site, output, call.step.run)
    cache = call.cache
    if cache is None and output is not None and hasattr(output, "items"):
        found = [output[n] for n in ("cache", "past_key_values") if n in output]
        cache = found[0] if found else None
    if cache is not None and call.step.run.cuts and hasattr(cache, "get_seq_length"):
        keep_run(cache, call.step.run)


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
