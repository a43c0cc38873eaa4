"""Evidence for language-stage methods beyond the layer before: the acting layer's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, Seen, is_causal
from tokenreduce.adapters.language.decoders import carries, hand_over, ids_left
from tokenreduce.adapters.language.generation import Run, rows_of
from tokenreduce.adapters.language.masks import add_sizes, gather_mask

__all__ = ["look_ahead"]


def look_ahead(
    layer: Any, x: Tensor, run: Run, index: int, kwargs: dict[str, Any], flash: bool, plain: bool = False
) -> Call:
    """Queries, keys and values that decoder layer ``index`` would compute for ``x`` (B,N,C), and its mask; the layer
    stops there and nothing reaches the cache. With ``plain``, queries and keys are not rotated.

    ``kwargs`` are what the model passed to the layer: tables and masks for all columns of the prompt.
    """
    tables, mask, cut = kwargs["position_embeddings"], kwargs.get("attention_mask"), run.cut_at(index - 1)
    ids = kwargs.get("position_ids")
    if cut is not None:
        where = cut.index
        tables = tuple(rows_of(t, where) for t in tables)
        ids = ids_left(layer, ids, where)
        if not flash:
            mask = gather_mask(mask, where, cut.valid, x.shape[1], is_causal(layer.self_attn))
            if cut.bias is not None:
                mask = add_sizes(mask, cut.bias, x, x.shape[1], causal=is_causal(layer.self_attn))
    if plain:
        cos, sin = tables
        tables = (torch.ones_like(cos), torch.zeros_like(sin))
    call = Call(mask, record=True, only=True)
    given = {"position_embeddings": tables, "attention_mask": mask, "position_ids": ids, CALL: call}
    if not carries(layer):
        hand_over(given)
    try:
        type(layer).forward(layer, x, **given)  # its hooks are for the call that counts
    except Seen:
        return call
    raise RuntimeError(f"{type(layer.self_attn).__name__} does not hand its keywords to the attention function")
