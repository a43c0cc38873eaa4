"""Whether methods can act inside the language model of a discovered model, at its decoder layers.

Columns go between layers only where everything that a layer is given along columns is known to follow: hidden states
(B,L,C), rotary tables, masks, position ids, ids of the caller. Everything is read off signatures; what is not known is
refused.
"""

from __future__ import annotations

import inspect
from typing import Any

from tokenreduce.adapters.language.decoders import MIXERS, strange_to, window_of
from tokenreduce.adapters.language.families import Family

__all__ = ["layers_of", "parts_of"]

#: What a language model may be given; DeepStack features are taken over.
_KNOWN = frozenset(
    (
        "self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep", "kwargs",
        "output_router_logits", "moe_mm_token_type_ids", "visual_pos_masks", "deepstack_visual_embeds",
        "block_sequence_ids", "per_layer_inputs",
    )
)  # fmt: skip
_DEEP = ("visual_pos_masks", "deepstack_visual_embeds")


def layers_of(inner: Any, text: Any) -> tuple[tuple[Any, ...], str]:
    """The decoder layers, and why no method can act in them ("" where some can)."""
    while text is not None and not hasattr(text, "layers") and hasattr(text, "model"):  # one with a head around it
        text = text.model
    layers = tuple(getattr(text, "layers", ()) if text is not None else getattr(inner, "layers", ()))
    return layers, "" if (why := _why_not(inner, text, layers)) is None else why


def _why_not(inner: Any, text: Any, layers: tuple[Any, ...]) -> str | None:
    if text is None:
        return "it merges features inside its language model"
    if not layers:
        return f"its language model, a {type(text).__name__}, has no .layers"
    for i, layer in enumerate(layers):
        if not any(hasattr(layer, m) for m in MIXERS):
            return f"its layer {i}, a {type(layer).__name__}, has none of {', '.join(MIXERS)}"
        if (what := strange_to(layer)) is not None:
            return f"its layer {i}, a {type(layer).__name__}, {what}"
        if not any(p.kind is p.VAR_KEYWORD for p in _parameters(layer).values()):
            return f"its layer {i}, a {type(layer).__name__}, takes no keywords besides its own"
        try:
            window_of(text.config, i)
        except ValueError as error:
            return str(error)
        except AttributeError as error:
            return f"its config says nothing of all layers: {error}"
    more = [name for name in _parameters(text) if name not in _KNOWN]
    if more:
        return f"its language model, a {type(text).__name__}, is given {', '.join(more)}, which would not follow"
    return None


def _parameters(module: Any) -> Any:
    return inspect.signature(inspect.unwrap(type(module).forward)).parameters


def parts_of(inner: Any, text: Any) -> Family:
    """What the table of families would say."""
    takes = inspect.signature(inspect.unwrap(type(inner).forward)).parameters
    types = "token_type_ids" if "token_type_ids" in takes else "mm_token_type_ids"
    return Family(deep=text is not None and all(name in _parameters(text) for name in _DEEP), types=types)
