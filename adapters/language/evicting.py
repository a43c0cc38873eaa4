"""Which cache-stage method acts at which layer, and what cannot go together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import implementation
from tokenreduce.adapters.language.batching import is_paged
from tokenreduce.adapters.language.cache_view import Viewer
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generation import KEYWORD, Forward, cache_in, is_known
from tokenreduce.adapters.language.rotary import PromptPositions, turning_of
from tokenreduce.adapters.language.steps.evict import Evict
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import active

__all__ = ["check_evicting", "evict_at", "evict_step", "groups_of", "keep_positions", "say_unknown"]


def evict_at(methods: Sequence[CacheReducer], found: Language) -> tuple[CacheReducer | None, ...]:
    """The method that takes keys out of the cache of each layer. Raises ``ValueError`` for two at one layer, and where
    none acts at all."""
    depth, out = len(found.layers), []
    for i in range(depth):
        here = [r for r in methods if r.acts_at(i, depth)]
        if len(here) > 1:
            raise ValueError(
                f"{' and '.join(r.spec() for r in here)} both take keys out of the cache of layer {i}; choose one"
            )
        out.append(here[0] if here and hasattr(found.layers[i], "self_attn") else None)
    config, model = found.text.config, found.generator or found.inner
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    for method in methods:
        method.check_model(type(model).__name__, depth, int(heads))
        if method not in out:
            raise ValueError(f"{method.spec()} acts at none of the {depth} layers of the language model")
    return tuple(out)


def check_evicting(evict: Sequence[CacheReducer | None], stepwise: Sequence[Reducer | None], layers: Any) -> None:
    """Raise ``ValueError`` for methods that read the cache in decode beside one that thins it, and for layers whose
    keys other layers use."""
    first = next((r for r in evict if r is not None), None)
    if first is None:
        return
    other = next((r for r in stepwise if r is not None), None)
    if other is not None:
        raise ValueError(
            f"{other.spec()} chooses among cached tokens in every decode step, and {first.spec()} takes them out of "
            f"the cache; choose one"
        )
    for i, method in enumerate(evict):
        attention = getattr(layers[i], "self_attn", None)
        if method is not None and getattr(attention, "is_kv_shared_layer", False):
            raise ValueError(f"layer {i} uses the keys of another layer, so that {method.spec()} cannot take any out")
        if method is not None and "flex" in implementation(attention):
            raise ValueError(
                f"{method.spec()} and attention implementation {implementation(attention)} do not go together; call "
                f"model.set_attn_implementation('sdpa')"
            )
        own = [] if attention is None else [name for name, _ in attention.named_parameters(recurse=False)]
        if method is not None and own and "attention" in method.required():
            raise ValueError(
                f"{method.name} ranks by attention, and {type(attention).__name__} has parameters of its own in its "
                f"softmax ({', '.join(own)}), which are not seen from outside; choose knorm or keydiff"
            )


def say_unknown(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, methods: str) -> None:
    """Pre-hook on the inner model: say that a cache which another model filled stays as it is."""
    cache = cache_in(kwargs)
    if cache is None or is_known(cache) or is_paged(cache) or not int(cache.get_seq_length()):
        return
    said = (
        f"{methods}: this cache was not filled by the patched model, or with text alone, so that no keys leave it; "
        f"give the whole prompt again without the cache"
    )
    trace = active()
    if trace is not None:
        trace.note(said)
    else:
        warnings.warn(said, stacklevel=2)


def evict_step(method: CacheReducer, every: Sequence[CacheReducer | None], found: Language, index: int) -> Evict:
    """The step of layer ``index``."""
    last = max(i for i, other in enumerate(every) if other == method)
    turning = turning_of(found.text, found.layers[index]) if "rotary" in method.required() else None
    mrope = "mrope_section" in (getattr(found.text.config, "rope_parameters", None) or {})
    return Evict(Viewer(method, len(every), turning, mrope), last)


def groups_of(attention: Any) -> int:
    """Query heads for each KV head."""
    return int(getattr(attention, "num_key_value_groups", 1))


def keep_positions(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on the language model: remember the positions of the prompt's columns."""
    forward: Forward | None = kwargs.get(KEYWORD)
    if forward is None or not forward.prefill:
        return
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(forward.columns.length, device=forward.columns.visual.device)[None]
    forward.state.put(PromptPositions(positions))
