"""What a call of an image/video language model brings: columns of the prompt, padding, a cache with earlier turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.generation import KEYWORD, Run, Step, cache_in, run_of
from tokenreduce.adapters.vlm_decode import Again
from tokenreduce.adapters.vlm_seen import encoded_in

__all__ = ["start", "whole_prefill"]


def whole_prefill(generator: Any, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate``'s prefill: in chunks, the first would choose tokens before the question is there."""
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} is not supported on a patched model, which "
            f"chooses tokens by the whole prompt; leave it None"
        )
    model_kwargs = args[0] if args else kwargs.get("model_kwargs", {})
    cache, mask = cache_in(model_kwargs), model_kwargs.get("attention_mask")
    run = None if cache is None else run_of(cache)
    cached = 0 if run is None else int(cache.get_seq_length())
    given = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[-1]
    if run is not None and cached and given == input_ids.shape[1]:
        # A turn that brings the cached tokens again: the library would take as many off as the cache holds.
        input_ids = input_ids[:, run.columns(cached) :]
    return type(generator)._prefill(generator, input_ids, generation_config, *args, **kwargs)


def start(
    inner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    ids: tuple[int, ...],
    slides: bool,
    again: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the inner model: make the run of this generation, or take it from the cache.

    What a later turn brings, images included, stays as it is. With ``again`` a method chooses in decode, too.
    """
    cache = cache_in(kwargs)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if cache is not None and cache.get_seq_length() > 0:
        run = run_of(cache)
        if run is None:
            return None
        new = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
        cached = int(cache.get_seq_length())
        columns = run.columns(cached) + new
        if columns > cached + new:
            _check_turn(kwargs.get("attention_mask"), columns, new)
        if new > 1 and kwargs.get("attention_mask") is not None:
            real = _padding(kwargs["attention_mask"], run.visual.shape[0], columns, slides)
            later = None if real is None else real[:, run.length :]
            run.later = None if later is None or bool(later.all()) else later
        return args, {
            **kwargs,
            KEYWORD: Step(run, prefill=False, given=kwargs.get("position_ids") is not None, new=new),
        }
    if tokens is not None:
        marks = [tokens == i for i in ids]
    else:
        embeds = kwargs["inputs_embeds"]
        table = inner.get_input_embeddings()
        marks = [(embeds == table(torch.tensor(i, device=embeds.device))).all(-1) for i in ids]
    visual = torch.stack(marks).any(0)
    if not bool(visual.any()):
        return None
    padding = _padding(kwargs.get("attention_mask"), visual.shape[0], visual.shape[1], slides)
    _check_packed(kwargs)
    newline = getattr(inner, "image_newline", None)
    given = {k: encoded_in(v) for k, v in (kwargs.get("mm_encoder_outputs") or {}).items()}
    step = Step(
        Run(visual.shape[1], visual, padding, again=Again() if again else None),
        prefill=True,
        newline=newline,
        encoded={k: e for k, e in given.items() if e is not None},
        ids=tokens,
        kinds=dict(zip(("image", "video"), marks, strict=False)),
    )
    return args, {**kwargs, KEYWORD: step}


def _check_turn(mask: Any, columns: int, new: int) -> None:
    """On a cache that is shorter than what the caller gave, masks show what the caller thinks is in there."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, but there are {columns} tokens: {columns - new} before "
                f"this call, visual tokens that were dropped included, and {new} new ones; pass only tokens that are "
                f"new, with the mask of all"
            )
    elif mask is not None and new > 1:
        raise ValueError(
            "a later turn on a static cache is not supported with projector-stage methods; leave cache_implementation "
            "at its default"
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
        if slides and mask.shape[2] != columns:
            raise ValueError(
                "a later turn on a static cache is not supported where every layer has a sliding window; leave "
                "cache_implementation at its default"
            )
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
