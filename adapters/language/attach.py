"""Putting methods into an image/video language model: before, inside and behind its prefill.

A pre-hook on the inner model makes a :class:`~tokenreduce.adapters.language.generation.Run` at prefill and passes it on
as a keyword; pre-hooks on decoder layers compute plans from the attention of the layer before, gather hidden states,
rotary tables and masks from the acting layer on, and rebuild the mask of those layers in decode, where their caches are
shorter than the prompt. Kept tokens keep their original positions, and sliding windows count them.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenreduce.adapters.encoders.hf_attention import listen
from tokenreduce.adapters.language.ahead import drop_prompt, keep_prompt
from tokenreduce.adapters.language.batching import attach_batching
from tokenreduce.adapters.language.decode import Site, check_later, choose_again, last_only
from tokenreduce.adapters.language.decoders import (
    carries,
    check_deep,
    check_implementation,
    check_layers,
    final_norm,
    hand_on,
    take_up,
    window_of,
)
from tokenreduce.adapters.language.drafts import attach_drafts
from tokenreduce.adapters.language.families import FAMILIES, Language
from tokenreduce.adapters.language.given import Arrived, attach_given
from tokenreduce.adapters.language.labels import attach_labels
from tokenreduce.adapters.language.layer import enter, take_deep
from tokenreduce.adapters.language.middle import attach_middle, is_middle
from tokenreduce.adapters.language.projector.choose import attach_projector
from tokenreduce.adapters.language.projector.marks import needs_marks
from tokenreduce.adapters.language.prompt import WholePrefill, start, start_alone
from tokenreduce.adapters.language.retrieval import attach_retrieval, check_owner, note_run
from tokenreduce.adapters.language.towers import Everything, attach_encoder
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach"]


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo, towers: Any = ()) -> None:
    """Put ``reducers`` into the model; encoder-stage ones into its ``towers``, (adapter, tower) each.

    Raises ``ValueError`` for layers that do not exist or clash, and for attention that dropping tokens would change:
    chunked, linear and other layer types than full and sliding, or sliding windows inside flash attention.
    """
    depth = len(found.layers)
    check_owner(found, reducers)
    methods = " + ".join(r.spec() for r in reducers)
    before = [r for r in reducers if r.stage == "projector"]
    inside = tuple(r for r in reducers if r.stage == "encoder")
    if inside:
        attach_encoder(towers, inside, undo)
        before = before or [Everything()]
    caching = [r for r in reducers if r.stage == "cache"]
    reducers = tuple(r for r in reducers if r.stage == "language")
    films = any("films" in r.gathers() for r in reducers)
    marking = tuple(dict.fromkeys(r for r in reducers if needs_marks(r)))
    if films or marking:  # which frame a token is of, and what the tower saw of it, shows where it enters
        before = before or [Everything()]
    if len(before) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in before)} both act before the language model; choose one")
    acting: list[Reducer | None] = []
    for i in range(depth):
        here = [r for r in reducers if r.acts(i, depth)]
        if len(here) > 1:
            raise ValueError(f"{' and '.join(r.spec() for r in here)} both act before layer {i}; choose other layers")
        acting.append(here[0] if here else None)
    windows = [window_of(found.text.config, i) for i in range(depth)]
    present = [[r for r in (acting[i], *caching) if r is not None and r.acts(i, depth)] for i in range(depth)]
    again = [next((r for r in here if r.later()), None) for here in present]
    first = next((i for i, here in enumerate(present) if here), depth)
    behind = 0 if before else first  # the first layer that may see fewer tokens
    attach_labels(found.inner, found.generator, undo)
    if behind == depth:
        return
    check_layers(found.layers, behind, acting, again)
    check_later(present, windows, found.layers)
    for i in range(max(behind - 1, 0), depth):
        check_implementation(found.layers[i], i, windows[i])
    arrived = Arrived()
    begin = functools.partial(
        start, ids=found.ids, slides=None not in windows, again=tuple(i for i, r in enumerate(again) if r is not None),
        arrived=arrived, types=FAMILIES[found.family].types, methods=methods, front=first == depth and not any(windows),
    )  # fmt: skip
    if found.owner is not None:
        attach_retrieval(found, undo)
    undo.pre_hook(found.inner, begin)
    if found.owner is not None:
        undo.pre_hook(found.inner, note_run)
    undo.pre_hook(found.text, functools.partial(start_alone, inner=found.inner, begin=begin, arrived=arrived))
    if found.generator is not None:
        undo.mix_in(found.generator, WholePrefill)
        attach_batching(found.generator, found.ids, undo)
        attach_drafts(found.generator, next((r for r in again if r is not None), None), undo)
    if before:
        attach_projector(found, before[0], windows, undo, films, marking)
    attach_given(found, arrived, undo)
    if FAMILIES[found.family].deep:
        check_deep(found, depth)
        undo.pre_hook(found.text, functools.partial(take_deep, first=first))
    copies: dict[int, Any] = {}
    for i in range(depth):
        layer: Any = found.layers[i]
        reducer = acting[i]
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {i} has a forward of its own (accelerate's dispatch); call tr.patch before dispatching"
            )
        if not carries(layer):
            undo.pre_hook(layer.self_attn, take_up)
        after = acting[i + 1] if i + 1 < depth else None
        reads = after is not None and _reads(after)
        ahead = reducer is not None and "ahead" in reducer.gathers()
        chosen = [j for j in range(i + 1) if again[j] is not None]
        site = Site(again[i], chosen[-1] if chosen else None, i + 1 < depth and again[i + 1] is not None, depth)
        if reads or ahead or chosen or site.reads:
            listen(layer.self_attn, undo, copies)
        if chosen or site.reads:
            undo.pre_hook(layer, functools.partial(choose_again, index=i, site=site))
        if chosen and i == depth - 1:
            undo.hook(layer, last_only, with_kwargs=True)
        if i >= behind or reads or site.reads or is_middle(after, i + 1):
            undo.pre_hook(
                layer,
                functools.partial(
                    enter,
                    index=i,
                    depth=depth,
                    reducer=reducer,
                    reads=reads,
                    later=site.reads,
                    window=windows[i],
                    norm=final_norm(found.text, reducer),
                    plain=reducer is not None and "plain" in reducer.gathers() and _mrope(found.text.config),
                ),
            )
        if after is not None and is_middle(after, i + 1):
            attach_middle(layer, after, i + 1, depth, final_norm(found.text, after), undo)
        if not carries(layer):
            undo.pre_hook(layer, hand_on)  # behind the hooks above
        shown = reducer or again[i]
        if shown is not None:
            undo.set(layer, "_get_name", functools.partial(_name, type(layer).__name__, shown))
    asking = [i for i, r in enumerate(acting) if r is not None and "prompt" in r.gathers()]
    if asking:
        undo.pre_hook(found.layers[0], keep_prompt)  # behind the hooks above
        undo.pre_hook(found.layers[asking[-1]], drop_prompt)


def _reads(reducer: Reducer) -> bool:
    """Whether ``reducer`` looks at the attention of the layer before the one where it acts."""
    gathers = reducer.gathers()
    return "ahead" not in gathers and any(g in ("keys", "queries", "values", "attention") for g in gathers)


def _mrope(config: Any) -> bool:
    """Whether positions are places in time and image."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"
