"""What a call of an image/video language model brings: columns of the prompt, padding, a cache with earlier turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.batching import is_paged
from tokenreduce.adapters.language.cache import forget_generation
from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.drafts import sees_images
from tokenreduce.adapters.language.generation import (
    KEYWORD,
    Forward,
    Generation,
    Positions,
    cache_in,
    generation_of,
)
from tokenreduce.adapters.language.given import Arrived, brought_by, say_late, say_strange
from tokenreduce.adapters.language.projector.brought import Brought
from tokenreduce.adapters.language.projector.seen import encoded_in

__all__ = ["Start", "WholePrefill", "check_methods", "check_turn", "padding_in", "start", "start_alone"]


class WholePrefill(nn.Module):
    """Mixin of models that generate."""

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        return whole_prefill(self, super()._prefill, *args, **kwargs)  # type: ignore[misc]


def whole_prefill(
    generator: Any, stock: Callable[..., Any], input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """``generate``'s prefill, ``stock``: in chunks, the first would choose tokens before the question is there."""
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} is not supported on a patched model, which "
            f"chooses tokens by the whole prompt; leave it None"
        )
    model_kwargs = args[0] if args else kwargs.get("model_kwargs", {})
    if getattr(generation_config, "is_assistant", False):
        args, kwargs["is_first_iteration"] = args[:1], sees_images(generator, model_kwargs)
    return stock(input_ids, generation_config, *args, **kwargs)


@dataclass(frozen=True)
class Start:
    """What a patched model knows of the prompts it will get.

    ``ids`` are the placeholders, ``types`` is the argument that names visual tokens, ``arrived`` are features that the
    caller may have merged, and ``methods`` is what messages say. ``stepwise`` are the layers where a method chooses in
    decode, too. ``slides``: every layer has a sliding window. With ``front``, images behind a cached text are a prompt
    like any other.
    """

    ids: tuple[int, ...]
    types: str
    arrived: Arrived
    methods: str
    stepwise: tuple[int, ...] = ()
    slides: bool = False
    front: bool = False

    def brought(self, inner: Any, tokens: Tensor | None, kwargs: dict[str, Any]) -> Brought:
        """Which columns of a call are visual tokens."""
        if tokens is None:
            embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
            return brought_by(inner, embeds, self.ids, self.arrived, kwargs.get(self.types), mask)
        self.arrived.clear()
        kinds = {k: tokens == i for k, i in zip(("image", "video"), self.ids, strict=False)}
        return Brought(kinds, ids=tokens)


def start(
    inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: Start
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook on the inner model: begin a generation, or take it from the cache; the keyword is None where nothing is
    reduced.

    What a later turn brings, images included, stays as it is, and is said.
    """
    cache = cache_in(kwargs)
    if cache is not None and is_paged(cache):
        return args, kwargs
    tokens = kwargs.get("input_ids", args[0] if args else None)
    past = 0 if cache is None else int(cache.get_seq_length())
    if past:
        forward = _on_cache(inner, tokens, kwargs, past, known)
    else:
        if cache is not None:
            forget_generation(cache)
        forward = _first(inner, known.brought(inner, tokens, kwargs), kwargs, 0, known)
    return args, {**kwargs, KEYWORD: forward}


def start_alone(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, inner: Any, known: Start
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """First pre-hook on the language model: begin where a caller merges embeddings and calls it without the model
    around it."""
    if KEYWORD in kwargs:
        forward: Forward | None = kwargs[KEYWORD]
        brought = None if forward is None else forward.state.get(Brought)
        if forward is None or (brought is not None and brought.ids is not None):
            known.arrived.clear()  # the model merged them itself
        return (args, {k: v for k, v in kwargs.items() if k != KEYWORD}) if forward is None else None
    cache = cache_in(kwargs)
    if kwargs.get("inputs_embeds") is None and (cache is None or generation_of(cache) is None):
        return None  # ids alone bring no image
    args, kwargs = start(inner, args, kwargs, known=known)
    return args, {k: v for k, v in kwargs.items() if k != KEYWORD or v is not None}


def _on_cache(inner: Any, tokens: Tensor | None, kwargs: dict[str, Any], past: int, known: Start) -> Forward | None:
    """The forward of a call behind ``past`` cached columns."""
    cache = cache_in(kwargs)
    generation, new = generation_of(cache), _new(tokens, kwargs)
    brought = known.brought(inner, tokens, kwargs) if new > 1 else None
    images = brought is not None and (brought.strange or bool(brought.visual.any()))
    front = known.front and generation is None and int(cache.layers[0].get_mask_sizes(new)[0]) == past + new
    if images and not front:
        say_late(known.methods, generation is not None)
    if generation is not None:
        check_methods(generation, known.methods)
        return _later(generation, cache, new, kwargs)
    if brought is None or not (images and front):
        return None
    return _first(inner, brought.behind(past), kwargs, past, known)


def _first(inner: Any, brought: Brought, kwargs: dict[str, Any], past: int, known: Start) -> Forward | None:
    """The forward of a call that brings a prompt with its images, behind ``past`` cached columns; it begins a
    generation. None without images."""
    images = bool(brought.visual.any())
    if brought.strange:
        say_strange(known.methods, images)
    if not images:
        return None
    batch, length = brought.visual.shape
    padding = padding_in(kwargs.get("attention_mask"), batch, length, known.slides)
    _check_packed(kwargs)
    columns = Columns(brought.visual, padding, past, known.methods, revived=dict.fromkeys(known.stepwise))
    forward = Forward(Generation(columns, Positions(length)), "prefill")
    given = {k: encoded_in(v) for k, v in (kwargs.get("mm_encoder_outputs") or {}).items()}
    encoded = {**{k: e for k, e in given.items() if e is not None}, **brought.encoded}
    forward.state.put(replace(brought, encoded=encoded, newline=getattr(inner, "image_newline", None)))
    return forward


def _new(tokens: Tensor | None, kwargs: dict[str, Any]) -> int:
    """How many tokens a call brings."""
    return int((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])


def _later(generation: Generation, cache: Any, new: int, kwargs: dict[str, Any]) -> Forward:
    """The forward of a call on a cache that holds the prompt; its columns are the caller's, dropped ones included."""
    columns, past, mask = generation.columns, int(cache.get_seq_length()), kwargs.get("attention_mask")
    generation.positions.given = past + new
    flat = isinstance(mask, Tensor) and mask.dim() == 2
    grows = not any(hasattr(layer, "max_cache_len") for layer in cache.layers)
    if isinstance(mask, Tensor) and (flat or grows) and columns.reduced:
        check_turn(mask, past + new, new)
    # Masks with rows are taken as they are, in every call; methods that choose in decode still have to know padding.
    if new > 1 and mask is not None and (flat or (columns.revived and not grows)):
        real = padding_in(mask, columns.visual.shape[0], past + new, slides=False)
        behind = None if real is None else real[:, columns.length :]
        columns.real_behind = None if behind is None or bool(behind.all()) else behind
    return Forward.behind(generation, new, past, cache, masked=mask is not None and not flat and grows)


def check_methods(generation: Generation, methods: str) -> None:
    """Raise ``ValueError`` for a cache that other methods reduced: layers before our first hook, and methods that
    choose in decode, would read another one than was made."""
    columns = generation.columns
    if columns.reduced and columns.chosen_by != methods:
        raise ValueError(
            f"this cache holds a prompt that {columns.chosen_by} reduced, and this model is patched with {methods}; "
            f"patch it as it was, or give the whole prompt again without the cache"
        )


def check_turn(mask: Tensor, columns: int, new: int) -> None:
    """Raise ``ValueError`` unless a mask (B,S) or (B,1,Q,S) shows what the caller thinks is cached: all that was given,
    not what layers hold."""
    if mask.dim() not in (2, 4) or mask.shape[-1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns for {columns} tokens: {columns - new} before this call, "
            f"visual tokens that were dropped included, and {new} new ones; give (batch, tokens) or "
            f"(batch, 1, new tokens, tokens), and only tokens that are new"
        )


def padding_in(mask: Any, batch: int, columns: int, slides: bool) -> Tensor | None:
    """(B,L) bool of the real columns, None when all L are: from a padding mask, or from the 4-D masks (one, or one per
    layer type) that ``generate`` makes for a static cache.

    The last row of a full-attention mask sees every real token, since padding is masked as keys only. Where every
    layer ``slides``, the diagonal is the padding of a prompt, since a real token sees itself.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    _check_padding(mask, columns)
    if mask.dim() == 4:
        square = mask[:, 0, :, :columns]
        row = square.diagonal(dim1=1, dim2=2) if slides else square[:, -1]
        mask = row if row.dtype == torch.bool else row == 0
        mask = mask.expand(batch, -1)
    return None if bool(mask.all()) else mask.bool()


def _check_padding(mask: Any, columns: int) -> None:
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < columns:
        shape = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a patched model takes attention_mask as padding mask (batch, tokens) or (batch, 1, tokens, slots), for "
            f"all {columns} tokens, cached ones included, not {shape}"
        )
    if mask.dim() == 2 and mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {columns} tokens, cached ones included; a patched model "
            f"takes the whole prompt in one call"
        )


def _check_packed(kwargs: dict[str, Any]) -> None:
    """Several sequences in one row have several last tokens, and no method chooses for them one by one."""
    positions = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if isinstance(positions, Tensor) and kwargs.get("attention_mask") is None:
        if positions.dim() == 3:  # M-RoPE: only row 0 of four counts tokens
            positions = positions[0] if positions.shape[0] == 4 else positions[0, :, :1]
        packed = packed or bool((positions.diff(dim=-1) < 0).any())
    if packed:
        raise ValueError("a patched model takes one sequence per row, not packed sequences; pad the batch instead")
