"""What a decoder layer needs along the columns of the prompt, and which layers columns can go before.

A layer is given hidden states, masks, rotary tables and position ids, and all of these follow when columns go. One that
is given anything else (features per layer, indices of keys), or that makes its positions itself, is refused when the
model is patched, by the name of what it takes.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, implementation
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generation import KEYWORD
from tokenreduce.core.reducer import Reducer

__all__ = [
    "MIXERS", "attends", "carries", "check_deep", "check_implementation", "check_layers", "final_norm", "hand_over",
    "ids_left", "needs_ids", "strange_to", "take_up", "window_of",
]  # fmt: skip

#: What may be given to a layer and to its attention: it follows the columns, or has none.
_KNOWN = frozenset(
    (
        "self", "hidden_states", "attention_mask", "position_ids", "cache", "past_key_values", "past_key_value",
        "position_embeddings", "use_cache", "output_attentions", "cache_position", "kwargs",
    )
)  # fmt: skip
#: Where a layer keeps what mixes its tokens. Only the first attends; the others read a padding mask (B,L), carry a
#: state from token to token, and show no evidence.
MIXERS = ("self_attn", "linear_attn", "conv")
_NORMS = ("norm", "final_layernorm", "final_layer_norm")
#: Keywords for the attention of the layer that is under way, where the layer does not hand them on.
_HANDED: ContextVar[dict[str, Any] | None] = ContextVar("tokenreduce_handed", default=None)


@functools.lru_cache(maxsize=256)
def _signature(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind.forward).parameters)


def _parameters(part: Any) -> dict[str, inspect.Parameter]:
    """What the forward of a module takes, by name."""
    kind: Any = type(part)
    return _signature(kind)


def attends(layer: Any) -> bool:
    """Whether tokens attend to each other in a layer."""
    return hasattr(layer, "self_attn")


def _mixer(layer: Any) -> Any:
    return next(m for name in MIXERS if (m := getattr(layer, name, None)) is not None)


# -- checks at patch -------------------------------------------------------------------------------------------------
def check_layers(
    layers: Sequence[Any], first: int, acting: Sequence[Reducer | None], stepwise: Sequence[Reducer | None]
) -> None:
    """Raise ``ValueError`` for a layer from ``first`` on that needs what does not follow the columns, and for methods
    that read an attention of which we do not see all. ``acting`` and ``stepwise`` are the methods before every layer,
    in prefill and in decode."""
    for i in range(first, len(layers)):
        _check_given(layers[i], i)
    for i, layer in enumerate(layers):
        nearest = [stepwise[i], acting[i], acting[i + 1] if i + 1 < len(layers) else None]
        for reducer in (r for r in nearest if r is not None):
            _check_given(layer, i)
            if not attends(layer):
                _check_state(layers, i, reducer, acting)
                continue
            _check_read(layer, i, reducer)


def _check_given(layer: Any, index: int) -> None:
    if (what := strange_to(layer)) is not None:
        raise ValueError(
            f"layer {index} of the language model, a {type(layer).__name__}, {what}. Tokens can be dropped before "
            f"layers of hidden states, masks, position ids and rotary tables (Llama, Mistral, Qwen, Gemma, Phi, GLM); "
            f"no method of this library fits this language model: give it smaller images instead"
        )


def strange_to(layer: Any) -> str | None:
    """What a layer needs that would not follow the columns, None where all it needs does."""
    given, inside = _parameters(layer), _parameters(_mixer(layer))
    more = [name for p in (given, inside) for name in p if name not in _KNOWN and not name.endswith("token_type_ids")]
    if "position_embeddings" not in given:
        return "is not given rotary tables: it knows positions in a way of its own (learned, ALiBi, convolutions)"
    if more:
        return f"is given {', '.join(dict.fromkeys(more))}, which would not follow the tokens that are left"
    return None


def _check_state(layers: Sequence[Any], index: int, reducer: Reducer, acting: Sequence[Reducer | None]) -> None:
    """Raise ``ValueError`` for methods that look at a layer which does not attend, or choose in every step."""
    gathers = reducer.required()
    reads = any(g in gathers for g in ("keys", "queries", "values", "attention"))
    looks = acting[index] is reducer if "ahead" in gathers else acting[index] is not reducer
    if not (reads and looks) and "middle" not in gathers and not reducer.decode_mode():
        return
    good = [i + ("ahead" not in gathers) for i, layer in enumerate(layers) if attends(layer)]
    good = [i for i in good if i < len(layers)]
    never = reducer.decode_mode() or "middle" in gathers
    fits = "no such method fits this language model" if never else f"it can act before {', '.join(map(str, good))}"
    raise ValueError(
        f"{reducer.spec()} would look at layer {index}, where tokens are mixed by a "
        f"{type(_mixer(layers[index])).__name__} that shows no attention: {fits}"
    )


def _check_read(layer: Any, index: int, reducer: Reducer) -> None:
    attention = layer.self_attn
    if reducer.decode_mode() == "revive" and needs_ids(layer):
        raise ValueError(
            f"{reducer.spec()} brings tokens back in decode, at rotary tables of their own, but layer {index} "
            f"({type(layer).__name__}) scales queries by position ids; set revive=false"
        )
    gathers = reducer.required()
    if not any(g in gathers for g in ("queries", "attention", "ahead")) and not reducer.decode_mode():
        return
    own = [name for name, _ in attention.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{reducer.name} ranks by attention, and {type(attention).__name__} has parameters of its own in its "
            f"softmax ({', '.join(own)}), which are not seen from outside; choose a method that does not read it: "
            f"dart, or one at the projector stage (divprune, visionzip)"
        )


def window_of(config: Any, layer: int) -> int | None:
    """Width of the sliding window of a decoder layer, None for full attention."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "sliding_attention" if window is not None else "full_attention"
        if getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
    else:
        kind = types[layer]
    if kind in ("linear_attention", "conv"):
        return None
    if kind not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"layer {layer} of the language model has {kind}; language-stage methods support full_attention, "
            f"sliding_attention, linear_attention and conv"
        )
    return window if kind == "sliding_attention" else None


def check_implementation(layer: Any, index: int, window: int | None) -> str:
    """Name of the layer's attention implementation. Raises ``ValueError`` for one that dropping tokens would change."""
    if not attends(layer):
        return ""
    name = implementation(layer.self_attn)
    if "flex" in name:
        raise ValueError(
            f"attention implementation {name} is not supported with language-stage methods; call "
            f"model.set_attn_implementation('sdpa')"
        )
    if window is not None and "flash" in name:
        raise ValueError(
            f"layer {index} has a sliding window, which {name} counts over the tokens that are left instead of over "
            f"the original ones; call model.set_attn_implementation('sdpa')"
        )
    if "flash" in name and needs_ids(layer):
        raise ValueError(
            f"layer {index} scales queries by position ids, and {name} takes ids with gaps for packed sequences; call "
            f"model.set_attn_implementation('sdpa')"
        )
    return name


def check_deep(found: Language, depth: int) -> None:
    """Raise ``ValueError`` for DeepStack features (Qwen3-VL) behind the last layer."""
    config: Any = found.inner.config
    entries = len(config.vision_config.deepstack_visual_indexes)
    if entries >= depth:
        raise ValueError(
            f"{found.family} adds {entries} DeepStack features after the layers of a language model of {depth} layers; "
            f"fewer features than layers are supported"
        )


def final_norm(text: nn.Module, reducer: Reducer | None) -> nn.Module | None:
    """The norm behind the last layer, if ``reducer`` asks for it. Raises ``ValueError`` where none is known."""
    if reducer is None or "norm" not in reducer.required():
        return None
    for name in _NORMS:
        if isinstance(norm := getattr(text, name, None), nn.Module):
            return norm
    raise ValueError(
        f"{reducer.name} asks for the norm behind the last layer, which {type(text).__name__} does not have under one "
        f"of the names {', '.join(_NORMS)}; choose another method, such as fastv"
    )


# -- position ids ----------------------------------------------------------------------------------------------------
def needs_ids(layer: Any) -> bool:
    """Whether the attention of a layer cannot do without position ids (Ministral 3 scales queries by them)."""
    ids = _parameters(_mixer(layer)).get("position_ids")
    return ids is not None and ids.default is inspect.Parameter.empty


def ids_left(layer: Any, ids: Tensor | None, where: Tensor) -> Tensor | None:
    """(B,K) position ids at the columns ``where`` (B,K), for a layer that needs them; None for others, whose rotary
    tables are ready and where ids with gaps would look like packed sequences to flash attention."""
    if ids is None or not needs_ids(layer):
        return None
    return ids.to(where.device).expand(where.shape[0], -1).gather(1, where)


# -- keywords --------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=256)
def _hands_on(kind: Any) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except OSError:
        return False
    call = re.search(r"self\.self_attn\((?:[^()]|\([^()]*\))*\)", source)
    return call is not None and "**kwargs" in call.group()


def carries(layer: Any) -> bool:
    """Whether a layer hands its keywords on to its attention; StableLM's and Nemotron's do not."""
    kind: Any = type(layer)
    return _hands_on(kind)


def hand_over(kwargs: dict[str, Any]) -> None:
    """Keep our keywords among ``kwargs`` for the attention that is called next in this thread."""
    _HANDED.set({name: kwargs[name] for name in (KEYWORD, CALL) if name in kwargs})


def take_up(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """First pre-hook on the attention of such a layer."""
    handed = _HANDED.get()
    _HANDED.set(None)
    return (args, {**handed, **kwargs}) if handed else None
