"""Putting methods into an image/video language model: before, inside and behind its prefill.

A pre-hook on the inner model makes a :class:`~tokenreduce.adapters.language.generation.Run` at prefill and passes it on
as a keyword. Every decoder layer where something happens gets one
:class:`~tokenreduce.adapters.language.site.LayerSite`
with its steps in order. Kept tokens keep their original positions, and sliding windows count them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenreduce.adapters.encoders.hf_attention import listen
from tokenreduce.adapters.language.again import Site, check_later
from tokenreduce.adapters.language.batching import attach_batching
from tokenreduce.adapters.language.decoders import (
    attends,
    carries,
    check_deep,
    check_implementation,
    check_layers,
    final_norm,
    window_of,
)
from tokenreduce.adapters.language.drafts import attach_drafts
from tokenreduce.adapters.language.evicting import (
    check_evicting,
    evict_at,
    evict_step,
    groups_of,
    keep_positions,
    say_unknown,
)
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generic.observe import attach_looks
from tokenreduce.adapters.language.generic.towers import has_axes
from tokenreduce.adapters.language.given import Arrived, attach_given
from tokenreduce.adapters.language.labels import attach_labels
from tokenreduce.adapters.language.middle import is_middle
from tokenreduce.adapters.language.packing import check_packing
from tokenreduce.adapters.language.projector.choose import attach_projector
from tokenreduce.adapters.language.projector.marks import needs_marks
from tokenreduce.adapters.language.prompt import WholePrefill, start, start_alone
from tokenreduce.adapters.language.retrieval import attach_retrieval, check_owner, note_run
from tokenreduce.adapters.language.site import LayerSite, LayerStep
from tokenreduce.adapters.language.steps.again import ChooseAgain, LastOnly
from tokenreduce.adapters.language.steps.choose import Choose, SetAside
from tokenreduce.adapters.language.steps.deepstack import AddDeepstack, attach_deepstack
from tokenreduce.adapters.language.steps.entry import OwnCache, TakeEntry
from tokenreduce.adapters.language.steps.evict import Evict, ShowHeld
from tokenreduce.adapters.language.steps.gather import GatherColumns
from tokenreduce.adapters.language.steps.hand_on import HandOn
from tokenreduce.adapters.language.steps.listen import Listen
from tokenreduce.adapters.language.steps.middle import ChooseInside, TakeInside
from tokenreduce.adapters.language.steps.pack import Pack
from tokenreduce.adapters.language.steps.prompt import ForgetPrompt, KeepInput, KeepPrompt
from tokenreduce.adapters.language.towers import Everything, attach_encoder, cell_of
from tokenreduce.core.cache_codec import CacheCodec
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "layer_sites"]

#: Evidence of where a token comes from, which is noted at the entry of the language model.
WHENCE = ("films", "places")


@dataclass(frozen=True)
class Acting:
    """Who acts where in a language model of as many layers as ``windows`` (the width of each one's, if it slides).

    ``tower`` are the methods inside the vision tower, ``entry`` the one before the language model, ``layers`` those
    before each layer, ``again`` those that choose before it in every decode step, and ``evict`` those that take keys
    out of its cache.
    """

    tower: tuple[Reducer, ...]
    entry: Reducer | None
    layers: tuple[Reducer | None, ...]
    again: tuple[Reducer | None, ...]
    windows: tuple[int | None, ...]
    #: The method that takes keys out of each layer's cache.
    evict: tuple[CacheReducer | None, ...]
    #: The step behind each layer that stores its cache together with another's.
    pack: tuple[Pack | None, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def first(self) -> int:
        """The first layer before which a method chooses, the depth where none does."""
        here = (i for i in range(self.depth) if self.layers[i] is not None or self.again[i] is not None)
        return next(here, self.depth)

    @property
    def behind(self) -> int:
        """The first layer that may see fewer tokens."""
        return self.first if self.entry is None else 0

    @property
    def inside(self) -> tuple[Reducer, ...]:
        """The methods inside the language model in prefill."""
        return tuple(dict.fromkeys(r for r in self.layers if r is not None))

    @property
    def marking(self) -> tuple[Reducer, ...]:
        """Those of them that look at what the vision tower saw."""
        return tuple(r for r in self.inside if needs_marks(r))

    @property
    def told(self) -> tuple[str, ...]:
        """What they ask of where tokens come from: "films" (which frame), "places" (where in an image)."""
        asking = (*self.inside, *(r for r in self.evict if r is not None))
        return tuple(word for word in WHENCE if any(word in r.required() for r in asking))


def _acting(found: Language, reducers: tuple[Reducer, ...]) -> Acting:
    """Raises ``ValueError`` for methods that act in one place."""
    depth = len(found.layers)
    staged = {s: tuple(r for r in reducers if r.stage == s) for s in ("encoder", "projector", "language", "cache")}
    before, inside = staged["projector"], staged["language"]
    asking = [r for r in (*inside, *staged["cache"]) if not {*WHENCE}.isdisjoint(r.required()) or needs_marks(r)]
    shows = bool(staged["encoder"] or asking)
    if not before and shows:  # which token is of what shows where it enters
        before = (Everything(),)
    if len(before) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in before)} both act before the language model; choose one")
    layers: list[Reducer | None] = []
    for i in range(depth):
        here = [r for r in inside if r.acts_at(i, depth)]
        if len(here) > 1:
            raise ValueError(f"{' and '.join(r.spec() for r in here)} both act before layer {i}; choose other layers")
        layers.append(here[0] if here else None)
    evicting = tuple(r for r in staged["cache"] if isinstance(r, CacheReducer))
    choosing = [r for r in staged["cache"] if not isinstance(r, CacheReducer | CacheCodec)]
    packing = [r for r in staged["cache"] if isinstance(r, CacheCodec)]
    windows = tuple(window_of(found.text.config, i) for i in range(depth))  # type: ignore[arg-type]
    present = [[r for r in (layers[i], *choosing) if r is not None and r.acts_at(i, depth)] for i in range(depth)]
    again = tuple(next((r for r in here if r.decode_mode()), None) for here in present)
    evict = evict_at(evicting, found)
    pack = check_packing(packing, found, layers, (evict, again), windows)
    acting = Acting(staged["encoder"], before[0] if before else None, tuple(layers), again, windows, evict, pack)
    check_evicting(evict, again, found.layers)
    counting = " and ".join(r.spec() for r in inside if r.size_power)
    if any(again) and counting:
        raise ValueError(
            f"{counting} counts merged tokens by their sizes, which methods that choose again in decode do not; set "
            f"size_bias='none', or leave one of them out"
        )
    if acting.behind < depth:
        check_layers(found.layers, acting.behind, layers, list(again))
        check_later(present, list(windows), found.layers)
    return acting


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo, towers: Any = ()) -> None:
    """Put ``reducers`` into the model; encoder-stage ones into its ``towers``, (adapter, tower) each.

    Raises ``ValueError`` for layers that do not exist or clash, and for attention that dropping tokens would change:
    chunked, linear and other layer types than full and sliding, or sliding windows inside flash attention.
    """
    check_owner(found, reducers)
    if inside := tuple(r for r in reducers if r.stage == "encoder"):
        cell = 1 if found.vision is None else cell_of(found.inner, found.vision.kind)
        attach_encoder(towers, inside, undo, cell)
    acting = _acting(found, reducers)
    attach_labels(found.inner, found.generator, undo)
    if acting.behind == acting.depth and not any(acting.evict) and not any(acting.pack):
        return
    for i in range(max(acting.behind - 1, 0), acting.depth):
        check_implementation(found.layers[i], i, acting.windows[i])
    arrived = Arrived()
    _attach_start(found, acting, arrived, " + ".join(r.spec() for r in reducers), undo)
    if acting.entry is not None:
        known = found.how == "table"
        attach_projector(
            found, acting.entry, list(acting.windows), undo, acting.told, acting.marking,
            None if known else attach_looks, not known and has_axes(found.inner),
        )  # fmt: skip
    attach_given(found, arrived, undo)
    if found.parts.deep:
        check_deep(found, acting.depth)
        attach_deepstack(found.text, acting.first, undo)
    if any("rotary" in r.required() for r in acting.evict if r is not None):
        undo.pre_hook(found.text, keep_positions)
    _attach_layers(found, acting, undo)


def _attach_start(found: Language, acting: Acting, arrived: Arrived, methods: str, undo: Undo) -> None:
    """Where a generation begins: on the inner model, on the language model alone, and in ``generate``."""
    begin = functools.partial(
        start, ids=found.ids, slides=None not in acting.windows, arrived=arrived, methods=methods,
        again=tuple(i for i, r in enumerate(acting.again) if r is not None), types=found.parts.types,
        front=acting.first == acting.depth and not any(acting.windows),
    )  # fmt: skip
    if found.owner is not None:
        attach_retrieval(found, undo)
    undo.pre_hook(found.inner, begin)
    if any(acting.evict):
        undo.pre_hook(found.inner, functools.partial(say_unknown, methods=methods))
    if found.owner is not None:
        undo.pre_hook(found.inner, note_run)
    undo.pre_hook(found.text, functools.partial(start_alone, inner=found.inner, begin=begin, arrived=arrived))
    if found.generator is not None:
        undo.mix_in(found.generator, WholePrefill)
        attach_batching(found.generator, found.ids, undo)
        stepwise = (*acting.again, *(r for r in acting.evict if r is not None and (r.every() or r.temporary())))
        attach_drafts(found.generator, next((r for r in stepwise if r is not None), None), undo)


def _attach_layers(found: Language, acting: Acting, undo: Undo) -> None:
    copies: dict[int, Any] = {}
    for site in layer_sites(found, acting):
        layer: Any = found.layers[site.index]
        if "forward" in vars(layer):
            raise ValueError(
                f"layer {site.index} has a forward of its own (accelerate's dispatch); call tr.patch before dispatching"
            )
        looks = [isinstance(s, Listen | ChooseAgain) or (isinstance(s, Choose | Evict) and s.looks) for s in site.steps]
        if any(looks):
            listen(layer.self_attn, undo, copies)
        site.attach(layer, undo)
        pack = acting.pack[site.index]
        shown = acting.layers[site.index] or acting.again[site.index] or acting.evict[site.index]
        shown = pack.method if shown is None and pack is not None else shown
        if shown is not None:
            undo.set(layer, "_get_name", functools.partial(_name, type(layer).__name__, shown))


def layer_sites(found: Language, acting: Acting) -> list[LayerSite]:
    """The decoder layers where something happens, and what, in order."""
    sites = [LayerSite(i, tuple(_steps(found, acting, i))) for i in range(acting.depth)]
    some = [site for site in sites if site.steps]
    first = some[0]
    return [LayerSite(first.index, (OwnCache(), *first.steps)), *some[1:]]


def _steps(found: Language, acting: Acting, i: int) -> Iterator[LayerStep]:
    """What happens at layer ``i``, in order."""
    depth, reducer = acting.depth, acting.layers[i]
    following = acting.layers[i + 1] if i + 1 < depth else None
    chosen = [j for j in range(i + 1) if acting.again[j] is not None]
    asks_next = i + 1 < depth and acting.again[i + 1] is not None
    reads = following is not None and _reads(following)
    asking = [j for j, r in enumerate(acting.layers) if r is not None and "prompt" in r.required()]
    evict, pack = acting.evict[i], acting.pack[i]
    before = following is not None and "before" in following.required()
    needed = evict or pack or reads or asks_next or before or is_middle(following, i + 1)
    if not (i >= acting.behind or needed or (asking and i == 0)):
        return
    if chosen or asks_next:
        yield ChooseAgain(Site(acting.again[i], chosen[-1] if chosen else None, asks_next, depth))
    if i == 0 and acting.entry is not None:
        yield TakeEntry()
    middle = is_middle(reducer, i)
    if middle:
        yield TakeInside()
    if found.parts.deep:
        yield AddDeepstack(cut_before=middle)
    if reducer is not None and not middle:
        plain = "plain" in reducer.required() and _mrope(found.text.config)
        yield Choose(reducer, depth, acting.windows[i], final_norm(found.text, reducer), plain, _seen(found, i))
        if reducer.decode_mode() == "revive":
            yield SetAside()
    if i >= acting.behind:
        yield GatherColumns(acting.windows[i])
    if evict is not None:
        yield ShowHeld(acting.windows[i], groups_of(found.layers[i].self_attn))
    if before:
        yield KeepInput()
    if reads or asks_next:
        yield Listen(reads, asks_next)
    if evict is not None:
        yield evict_step(evict, acting.evict, found, i)
    if pack is not None:
        yield pack
    if following is not None and is_middle(following, i + 1):
        yield ChooseInside(following, i + 1, depth, final_norm(found.text, following))
    if i == 0 and asking:
        yield KeepPrompt()
    if asking and i == asking[-1]:
        yield ForgetPrompt()
    if chosen and i == depth - 1:
        yield LastOnly()
    if not carries(found.layers[i]):
        yield HandOn()


def _seen(found: Language, i: int) -> Any:
    """The nearest attention at or before layer ``i``, where the layer itself has none."""
    if attends(found.layers[i]):
        return None
    near = [layer for layer in (*found.layers[:i][::-1], *found.layers) if attends(layer)]
    return near[0].self_attn if near else None


def _reads(reducer: Reducer) -> bool:
    """Whether ``reducer`` looks at the attention of the layer before the one where it acts."""
    gathers = reducer.required()
    return "ahead" not in gathers and any(g in ("keys", "queries", "values", "attention") for g in gathers)


def _mrope(config: Any) -> bool:
    """Whether positions are places in time and image."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"
