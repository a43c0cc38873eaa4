"""Evidence for language-stage methods beyond the layer before: the acting layer's own attention."""

from __future__ import annotations

import torch

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, Seen, is_causal
from tokenreduce.adapters.language.decoders import carries, hand_over, ids_left
from tokenreduce.adapters.language.masks import Shown, add_sizes, gather_mask
from tokenreduce.adapters.language.rotary import rows_of
from tokenreduce.adapters.language.site import LayerCall

__all__ = ["look_ahead"]


def look_ahead(call: LayerCall, flash: bool, plain: bool = False) -> Call:
    """Queries, keys and values that the layer of ``call`` would compute, and its mask; the layer stops there and
    nothing reaches the cache. With ``plain``, queries and keys are not rotated.

    The call has what the model passed to the layer: tables and masks for all columns of the prompt.
    """
    layer, x = call.layer, call.x
    tables, mask, cut = call.tables, call.mask, call.columns.cut_at(call.index - 1)
    ids = call.kwargs.get("position_ids")
    if cut is not None:
        where = cut.columns.at
        tables = tuple(rows_of(t, where) for t in tables)
        ids = ids_left(layer, ids, where)
        if not flash:
            mask = gather_mask(mask, cut.columns, x.shape[1], is_causal(layer.self_attn))
            if cut.bias is not None:
                mask = add_sizes(mask, cut.bias, x, Shown(x.shape[1], x.shape[1]), is_causal(layer.self_attn))
    if plain:
        cos, sin = tables
        tables = (torch.ones_like(cos), torch.zeros_like(sin))
    seen = Call(mask, record=True, only=True)
    given = {"position_embeddings": tables, "attention_mask": mask, "position_ids": ids, CALL: seen}
    if not carries(layer):
        hand_over(given)
    try:
        type(layer).forward(layer, x, **given)  # its hooks are for the call that counts
    except Seen:
        return seen
    raise RuntimeError(f"{type(layer.self_attn).__name__} does not hand its keywords to the attention function")
