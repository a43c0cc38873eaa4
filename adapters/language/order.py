"""The steps of every decoder layer, in the order in which they run: the one place where a step is put in line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenreduce.adapters.language.acting import Acting
from tokenreduce.adapters.language.decode import Asker
from tokenreduce.adapters.language.decoders import attends, carries, final_norm
from tokenreduce.adapters.language.evicting import evict_step, groups_of
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.middle import is_middle
from tokenreduce.adapters.language.reduce import Chooser
from tokenreduce.adapters.language.site import LayerSite, LayerStep
from tokenreduce.adapters.language.steps.choose import Choose
from tokenreduce.adapters.language.steps.deepstack import AddDeepstack
from tokenreduce.adapters.language.steps.entry import OwnCache, TakeEntry
from tokenreduce.adapters.language.steps.evict import ShowHeld
from tokenreduce.adapters.language.steps.gather import GatherColumns
from tokenreduce.adapters.language.steps.hand_on import HandOn
from tokenreduce.adapters.language.steps.hide import Hide
from tokenreduce.adapters.language.steps.listen import Listen
from tokenreduce.adapters.language.steps.middle import ChooseInside, TakeInside
from tokenreduce.adapters.language.steps.prompt import ForgetPrompt, KeepInput, KeepPrompt
from tokenreduce.adapters.language.steps.revive import LastOnly, Revive, SetAside
from tokenreduce.adapters.language.steps.show_choice import ShowChoice
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import Reducer

__all__ = ["layer_sites", "steps_at"]


def layer_sites(found: Language, acting: Acting) -> list[LayerSite]:
    """The decoder layers where something happens, and what, in order."""
    sites = [LayerSite(i, tuple(steps_at(found, acting, i))) for i in range(acting.depth)]
    some = [site for site in sites if site.steps]
    first = some[0]
    return [LayerSite(first.index, (OwnCache(), *first.steps)), *some[1:]]


def steps_at(found: Language, acting: Acting, i: int) -> Iterator[LayerStep]:
    """What happens at layer ``i``, in order."""
    here = Here.of(acting, i)
    if not here.something:
        return
    yield from _decode_steps(acting, here)
    if i == 0 and acting.entry is not None:
        yield TakeEntry()
    yield from _prefill_steps(found, acting, here)
    if i >= acting.behind:
        yield GatherColumns(acting.windows[i])
    yield from _cache_steps(found, acting, here)
    yield from _next_steps(found, acting, here)
    if here.since is not None and i == acting.depth - 1:
        yield LastOnly()
    if not carries(found.layers[i]):
        yield HandOn()


@dataclass(frozen=True)
class Here:
    """What decides on the steps of layer ``i``: the method before it, and the one before the next, ``following``."""

    i: int
    reducer: Reducer | None
    following: Reducer | None
    evict: CacheReducer | None
    #: The layer before which the choice that holds here in decode was made, and whether the next layer's method asks.
    since: int | None
    asks_next: bool
    #: Layers whose methods look at what entered the language model.
    asking: tuple[int, ...]
    something: bool = False

    @staticmethod
    def of(acting: Acting, i: int) -> Here:
        last = i + 1 == acting.depth
        here = Here(
            i, acting.layers[i], None if last else acting.layers[i + 1], acting.evict[i],
            max((j for j in range(i + 1) if acting.stepwise[j] is not None), default=None),
            not last and acting.stepwise[i + 1] is not None,
            tuple(j for j, r in enumerate(acting.layers) if r is not None and "prompt" in r.required()),
        )  # fmt: skip
        needed = here.evict or acting.pack[i] or here.reads or here.asks_next or here.keeps_input
        inside = is_middle(here.following, i + 1)
        return replace(here, something=bool(i >= acting.behind or needed or inside or (here.asking and i == 0)))

    @property
    def reads(self) -> bool:
        """Whether the next layer's method looks at the attention of this one."""
        return self.following is not None and _reads(self.following)

    @property
    def keeps_input(self) -> bool:
        """Whether the next layer's method looks at what entered this one."""
        return self.following is not None and "before" in self.following.required()


def _decode_steps(acting: Acting, here: Here) -> Iterator[LayerStep]:
    """Methods that choose again for every new token."""
    method = acting.stepwise[here.i]
    if method is not None:
        asker = Asker(method, acting.depth)
        yield Revive(asker) if method.decode_mode() == "revive" else Hide(asker)
    if here.since is not None:
        yield ShowChoice(here.since, here.asks_next)


def _prefill_steps(found: Language, acting: Acting, here: Here) -> Iterator[LayerStep]:
    """The method before the layer, or what one inside the layer before left."""
    i, reducer = here.i, here.reducer
    middle = is_middle(reducer, i)
    if middle:
        yield TakeInside()
    if found.parts.deep:
        yield AddDeepstack(cut_before=middle)
    if reducer is not None and not middle:
        plain = "plain" in reducer.required() and _mrope(found.text.config)
        norm = final_norm(found.text, reducer)
        yield Choose(Chooser(reducer, i, acting.depth, norm, plain, _seen(found, i)), acting.windows[i])
        if reducer.decode_mode() == "revive":
            yield SetAside()


def _cache_steps(found: Language, acting: Acting, here: Here) -> Iterator[LayerStep]:
    """What is asked of the layer's attention, and what its cache loses."""
    i = here.i
    if here.evict is not None:
        yield ShowHeld(acting.windows[i], groups_of(found.layers[i].self_attn))
    if here.keeps_input:
        yield KeepInput()
    if here.reads or here.asks_next:
        yield Listen(here.reads, here.asks_next)
    if here.evict is not None:
        yield evict_step(here.evict, acting.evict, found, i)
    if (pack := acting.pack[i]) is not None:
        yield pack


def _next_steps(found: Language, acting: Acting, here: Here) -> Iterator[LayerStep]:
    """What the methods before other layers want of this one."""
    i = here.i
    if here.following is not None and is_middle(here.following, i + 1):
        yield ChooseInside(Chooser(here.following, i + 1, acting.depth, final_norm(found.text, here.following)))
    if here.asking and i == 0:
        yield KeepPrompt()
    if here.asking and i == here.asking[-1]:
        yield ForgetPrompt()


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
