"""Which layers of a cache are stored together, and what cannot go together with that."""

from __future__ import annotations

from collections.abc import Sequence

from tokenreduce.adapters.language.evicting import groups_of
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.steps.pack import Pack
from tokenreduce.core.cache_codec import CacheCodec
from tokenreduce.core.reducer import Reducer

__all__ = ["check_packing"]


def check_packing(
    methods: Sequence[CacheCodec],
    found: Language,
    inside: Sequence[Reducer | None],
    others: Sequence[Sequence[Reducer | None]],
    windows: Sequence[int | None],
) -> tuple[Pack | None, ...]:
    """The step of every layer. Raises ``ValueError`` for several such methods, for one that finds no pair, and where
    the layers of a pair would not hold the same tokens: ``inside`` are methods that act before a layer, ``others``
    those that take keys out of its cache, or choose among them."""
    depth = len(found.layers)
    out: list[Pack | None] = [None] * depth
    if not methods:
        return tuple(out)
    if len(methods) > 1:
        raise ValueError(f"{' and '.join(m.spec() for m in methods)} both pack the cache; choose one")
    method = methods[0]
    pairs = method.pairs(depth)
    if not pairs or pairs[-1][1] >= depth:
        raise ValueError(f"{method.spec()} pairs no layers of a language model of {depth}; give a smaller start")
    for lower, upper in pairs:
        for i in (lower, upper):
            other = next((r[i] for r in others if r[i] is not None), None)
            if other is not None:
                raise ValueError(f"{other.spec()} and {method.spec()} both change the cache of layer {i}; choose one")
            if windows[i] is not None:
                raise ValueError(
                    f"layer {i} has a sliding window, and {method.spec()} packs layers that keep all tokens"
                )
            if getattr(getattr(found.layers[i], "self_attn", None), "is_kv_shared_layer", False):
                raise ValueError(f"layer {i} uses the keys of another layer, so that {method.spec()} cannot pack it")
        same = {groups_of(found.layers[i].self_attn) for i in (lower, upper)}
        if inside[upper] is not None or len(same) > 1:
            what = f"{inside[upper].spec()} acts between" if inside[upper] is not None else "heads differ between"  # type: ignore[union-attr]
            raise ValueError(f"{what} layers {lower} and {upper}, which {method.spec()} pairs; set start={lower + 1}")
        out[upper] = Pack(method, lower)
    return tuple(out)
