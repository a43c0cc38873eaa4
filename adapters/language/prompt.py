"""What a call of an image/video language model brings: columns of the prompt, padding, a cache with earlier turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenreduce.adapters.language.again import Again
from tokenreduce.adapters.language.batching import is_paged
from tokenreduce.adapters.language.cache import forget_run
from tokenreduce.adapters.language.drafts import sees_images
from tokenreduce.adapters.language.generation import KEYWORD, Run, Step, cache_in, run_of
from tokenreduce.adapters.language.given import Arrived, Brought, brought_by, say_late, say_strange
from tokenreduce.adapters.language.projector.seen import encoded_in

__all__ = ["WholePrefill", "start", "start_alone"]


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


def start(
    inner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    ids: tuple[int, ...],
    slides: bool,
    again: tuple[int, ...] = (),
    arrived: Arrived,
    types: str,
    methods: str,
    front: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook on the inner model: make the run of this generation, or take it from the cache; the keyword is None
    where nothing is reduced.

    What a later turn brings, images included, stays as it is, and is said. ``again`` are the layers where a method
    chooses in decode, too. ``arrived`` are features that the caller may have merged, ``types`` is the argument that
    names visual tokens, and ``methods`` what messages say. With ``front``, images behind a cached text are a prompt
    like any other.
    """
    cache = cache_in(kwargs)
    if cache is not None and is_paged(cache):
        return args, kwargs
    tokens = kwargs.get("input_ids", args[0] if args else None)
    new = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
    past = 0 if cache is None else int(cache.get_seq_length())
    brought = None
    if past:
        run = run_of(cache)
        brought = _brought(inner, tokens, kwargs, ids, arrived, types) if new > 1 else None
        images = brought is not None and (brought.strange or bool(brought.visual.any()))
        front = front and run is None and int(cache.layers[0].get_mask_sizes(new)[0]) == past + new
        if images and not front:
            say_late(methods, run is not None)
        if run is not None:
            _check_methods(run, methods)
            return args, {**kwargs, KEYWORD: _later(run, cache, tokens, kwargs)}
        if not (images and front):
            return args, {**kwargs, KEYWORD: None}
    elif cache is not None:
        forget_run(cache)
    if brought is None:
        brought = _brought(inner, tokens, kwargs, ids, arrived, types)
    brought = brought.behind(past) if past else brought
    images = bool(brought.visual.any())
    if brought.strange:
        say_strange(methods, images)
    if not images:
        return args, {**kwargs, KEYWORD: None}
    step = _first(inner, brought, tokens, kwargs, past=past, slides=slides, again=again, methods=methods)
    return args, {**kwargs, KEYWORD: step}


def start_alone(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, inner: Any, begin: Any, arrived: Arrived
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """First pre-hook on the language model: begin where a caller merges embeddings and calls it without the model
    around it."""
    if KEYWORD in kwargs:
        step: Step | None = kwargs[KEYWORD]
        if step is None or step.ids is not None:
            arrived.clear()  # the model merged them itself
        return (args, {k: v for k, v in kwargs.items() if k != KEYWORD}) if step is None else None
    cache = cache_in(kwargs)
    if kwargs.get("inputs_embeds") is None and (cache is None or run_of(cache) is None):  # ids alone bring no image
        return None
    args, kwargs = begin(inner, args, kwargs)
    return args, {k: v for k, v in kwargs.items() if k != KEYWORD or v is not None}


def _brought(
    inner: Any, tokens: Tensor | None, kwargs: dict[str, Any], ids: tuple[int, ...], arrived: Arrived, types: str
) -> Brought:
    """Which columns of a call are visual tokens."""
    if tokens is None:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        return brought_by(inner, embeds, ids, arrived, kwargs.get(types), mask)
    arrived.clear()
    return Brought({k: tokens == i for k, i in zip(("image", "video"), ids, strict=False)})


def _first(
    inner: Any,
    brought: Brought,
    tokens: Tensor | None,
    kwargs: dict[str, Any],
    *,
    past: int,
    slides: bool,
    again: tuple[int, ...],
    methods: str,
) -> Step:
    """The step of a call that brings the prompt with its images, behind ``past`` cached columns; it begins a run."""
    batch, columns = brought.visual.shape
    padding = _padding(kwargs.get("attention_mask"), batch, columns, slides)
    _check_packed(kwargs)
    given = {k: encoded_in(v) for k, v in (kwargs.get("mm_encoder_outputs") or {}).items()}
    run = Run(
        columns,
        brought.visual,
        padding,
        again=Again(again) if again else None,
        front=past,
        methods=methods,
        given=columns,
    )
    return Step(
        run,
        prefill=True,
        newline=getattr(inner, "image_newline", None),
        encoded={**{k: e for k, e in given.items() if e is not None}, **brought.encoded},
        ids=pad(tokens, (past, 0)) if past and tokens is not None else tokens,
        kinds=brought.kinds,
        places=brought.places,
    )


def _later(run: Run, cache: Any, tokens: Tensor | None, kwargs: dict[str, Any]) -> Step:
    """The step of a call on a cache that holds the prompt; its columns are the caller's, dropped ones included."""
    new = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
    past, mask = int(cache.get_seq_length()), kwargs.get("attention_mask")
    run.given = past + new
    flat = isinstance(mask, Tensor) and mask.dim() == 2
    grows = not any(hasattr(layer, "max_cache_len") for layer in cache.layers)
    if isinstance(mask, Tensor) and (flat or grows) and run.reduced:
        _check_turn(mask, past + new, new)
    # Masks with rows are taken as they are, in every call; methods that choose in decode still have to know padding.
    if new > 1 and mask is not None and (flat or (run.again is not None and not grows)):
        real = _padding(mask, run.visual.shape[0], past + new, slides=False)
        later = None if real is None else real[:, run.length :]
        run.later = None if later is None or bool(later.all()) else later
    return Step(run, prefill=False, new=new, past=past, masked=mask is not None and not flat and grows)


def _check_methods(run: Run, methods: str) -> None:
    """Layers before our first hook, and methods that choose in decode, would read another cache than was made."""
    if run.reduced and run.methods != methods:
        raise ValueError(
            f"this cache holds a prompt that {run.methods} reduced, and this model is patched with {methods}; patch it "
            f"as it was, or give the whole prompt again without the cache"
        )


def _check_turn(mask: Tensor, columns: int, new: int) -> None:
    """Masks (B,S) and (B,1,Q,S) show what the caller thinks is cached: all that was given, not what layers hold."""
    if mask.dim() not in (2, 4) or mask.shape[-1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns for {columns} tokens: {columns - new} before this call, "
            f"visual tokens that were dropped included, and {new} new ones; give (batch, tokens) or "
            f"(batch, 1, new tokens, tokens), and only tokens that are new"
        )


def _padding(mask: Any, batch: int, columns: int, slides: bool) -> Tensor | None:
    """(B,L) bool of the real columns, None when all L are: from a padding mask, or from the 4-D masks (one, or one per
    layer type) that ``generate`` makes for a static cache.

    The last row of a full-attention mask sees every real token, since padding is masked as keys only. Where every
    layer ``slides``, the diagonal is the padding of a prompt, since a real token sees itself.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
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
    if mask.dim() == 4:
        square = mask[:, 0, :, :columns]
        row = square.diagonal(dim1=1, dim2=2) if slides else square[:, -1]
        mask = row if row.dtype == torch.bool else row == 0
        mask = mask.expand(batch, -1)
    return None if bool(mask.all()) else mask.bool()


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
