"""Putting methods into an image/video language model: before, inside and behind its prefill.

A pre-hook on the inner model begins a :class:`~tokenreduce.adapters.language.generation.Generation` at prefill and
passes it on as a keyword. Every decoder layer where something happens gets one
:class:`~tokenreduce.adapters.language.site.LayerSite` with its steps in order
(:mod:`tokenreduce.adapters.language.order`). Kept tokens keep their original positions, and sliding windows count them.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenreduce.adapters.encoders.hf_attention import listen
from tokenreduce.adapters.language.acting import Acting, acting_in
from tokenreduce.adapters.language.batching import attach_batching
from tokenreduce.adapters.language.decoders import check_deep, check_implementation
from tokenreduce.adapters.language.drafts import attach_drafts
from tokenreduce.adapters.language.evicting import keep_positions, say_unknown
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generic.encoder import check_looks, reduced_in
from tokenreduce.adapters.language.generic.observe import attach_looks
from tokenreduce.adapters.language.generic.towers import has_axes
from tokenreduce.adapters.language.given import Arrived, attach_given
from tokenreduce.adapters.language.labels import attach_labels
from tokenreduce.adapters.language.order import layer_sites
from tokenreduce.adapters.language.projector.choose import Entry, attach_projector, compact_positions
from tokenreduce.adapters.language.projector.embedded import settled
from tokenreduce.adapters.language.projector.tower import attach_tower_evidence
from tokenreduce.adapters.language.prompt import Start, WholePrefill, start, start_alone
from tokenreduce.adapters.language.retrieval import attach_retrieval, check_owner, note_generation
from tokenreduce.adapters.language.steps.deepstack import attach_deepstack
from tokenreduce.adapters.language.towers import attach_encoder, cell_of, check_aside
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach"]


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo, towers: Any = ()) -> None:
    """Put ``reducers`` into the model; encoder-stage ones into its ``towers``, (adapter, tower) each.

    Raises ``ValueError`` for layers that do not exist or clash, and for attention that dropping tokens would change:
    chunked, linear and other layer types than full and sliding, or sliding windows inside flash attention.
    """
    check_owner(found, reducers)
    if inside := tuple(r for r in reducers if r.stage == "encoder"):
        if found.how == "discovered":
            check_looks(reducers)
        check_aside(found.vision, reducers)
        cell = 1 if found.vision is None else cell_of(found.inner, found.vision.kind)
        attach_encoder(towers, inside, undo, cell)
    acting = acting_in(found, reducers)
    attach_labels(found.inner, found.generator, undo)
    if acting.behind == acting.depth and not any(acting.evict) and not any(acting.pack):
        return
    for i in range(max(acting.behind - 1, 0), acting.depth):
        check_implementation(found.layers[i], i, acting.windows[i])
    arrived = Arrived()
    _attach_start(found, acting, arrived, " + ".join(r.spec() for r in reducers), undo)
    if acting.entry is not None:
        _attach_entry(found, acting, acting.entry, towers, undo)
    attach_given(found, arrived, undo)
    if found.parts.deep:
        check_deep(found, acting.depth)
        attach_deepstack(found.text, acting.first, undo)
    if any("rotary" in r.required() for r in acting.evict if r is not None):
        undo.pre_hook(found.text, keep_positions)
    _attach_layers(found, acting, undo)


def _attach_start(found: Language, acting: Acting, arrived: Arrived, methods: str, undo: Undo) -> None:
    """Where a generation begins: on the inner model, on the language model alone, and in ``generate``."""
    known = Start(
        found.ids, found.parts.types, arrived, methods,
        stepwise=tuple(i for i, r in enumerate(acting.stepwise) if r is not None),
        slides=None not in acting.windows, front=acting.first == acting.depth and not any(acting.windows),
    )  # fmt: skip
    if found.owner is not None:
        attach_retrieval(found, undo)
    undo.pre_hook(found.inner, functools.partial(start, known=known))
    if any(acting.evict):
        undo.pre_hook(found.inner, functools.partial(say_unknown, methods=methods))
    if found.owner is not None:
        undo.pre_hook(found.inner, note_generation)
    undo.pre_hook(found.text, functools.partial(start_alone, inner=found.inner, known=known))
    if found.generator is not None:
        undo.mix_in(found.generator, WholePrefill)
        attach_batching(found.generator, found.ids, undo)
        often = (*acting.stepwise, *(r for r in acting.evict if r is not None and (r.every() or r.temporary())))
        attach_drafts(found.generator, next((r for r in often if r is not None), None), undo)


def _attach_entry(found: Language, acting: Acting, reducer: Reducer, towers: Any, undo: Undo) -> None:
    """The method before the language model, with what it looks at, and what others want to know there."""
    known = found.how == "table"
    assert isinstance(reducer, Projector)
    reducer = settled(found, reducer)
    compact = compact_positions(found, reducer, acting.windows, not known and has_axes(found.inner))
    entry = Entry(reducer, compact, acting.told, acting.scoring)
    attach_projector(found, entry, undo)
    if not known:
        attach_looks(found, entry.looks, undo, reduced_in(towers) if acting.tower else None)
    elif found.vision is not None:
        attach_tower_evidence(found, entry.looks, (*reducer.required(), *reducer.optional()), undo)


def _attach_layers(found: Language, acting: Acting, undo: Undo) -> None:
    copies: dict[int, Any] = {}
    for site in layer_sites(found, acting):
        layer: Any = found.layers[site.index]
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {site.index} has a forward of its own (accelerate's dispatch); call tr.patch before dispatching"
            )
        if any(step.listens for step in site.steps):
            listen(layer.self_attn, undo, copies)
        site.attach(layer, undo)
        pack = acting.pack[site.index]
        shown = acting.layers[site.index] or acting.stepwise[site.index] or acting.evict[site.index]
        shown = pack.method if shown is None and pack is not None else shown
        if shown is not None:
            undo.set(layer, "_get_name", functools.partial(_name, type(layer).__name__, shown))


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"
