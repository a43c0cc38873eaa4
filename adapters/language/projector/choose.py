"""The projector stage of image/video language models: fewer visual tokens before the language model.

A method sees one image at a time: a maximal run of placeholder tokens that come from one image is an image (a tile
where a family writes text between tiles, a frame where it writes timestamps), and its views one by one where it chooses
per view. Its plan is made from the embeddings at the entry of the language model, and from what the vision tower saw
(:mod:`tokenreduce.adapters.language.projector.tower`), in a pre-hook on that. What the plan leaves is written into
columns of the prompt (:mod:`tokenreduce.adapters.language.projector.placing`), and the others go before layer 0, where
the steps of the language stage (:mod:`tokenreduce.adapters.language.site`) take over, so that masks, windows, prefixes
and caches are exact in the same way.

Tokens that a plan only keeps stay bit-identical. What it mixes in the space of the tower's features goes through the
projector again.

Positions are compact or original (see :class:`~tokenreduce.algorithms.projector.Projector`). ``generate`` counts the
columns that it gave us; compact ids are these less what was dropped before them. With compact positions outputs stand
in the order of the plan, with original ones each at the place of its representative.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.families import TOWER, Language
from tokenreduce.adapters.language.generation import KEYWORD, Forward
from tokenreduce.adapters.language.projector.brought import brought_in
from tokenreduce.adapters.language.projector.clip_text import joint_space
from tokenreduce.adapters.language.projector.embedded import check_tower, tokenizer_source
from tokenreduce.adapters.language.projector.images import found_in, frames_in, places_in
from tokenreduce.adapters.language.projector.placing import Part, place_group, told_of
from tokenreduce.adapters.language.projector.questions import tokenizer_of
from tokenreduce.adapters.language.projector.scores import scores_of
from tokenreduce.adapters.language.projector.seen import ARRIVING
from tokenreduce.adapters.language.records import Frames, Places, TowerScores
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import Look
from tokenreduce.core.plan import Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step, active
from tokenreduce.core.undo import Undo

__all__ = ["Entry", "attach_projector", "check_projector", "compact_positions"]


@dataclass(frozen=True)
class Entry:
    """What is done at the entry of a language model: ``reducer`` chooses, with ``compact`` positions or not; ``told``
    says what is to be noted of where tokens come from, "frames" or "places" in an image; and the language-stage methods
    ``scoring`` score by what the tower saw."""

    reducer: Reducer
    compact: bool
    told: tuple[str, ...] = ()
    scoring: tuple[Reducer, ...] = ()
    #: Where the language model's tokenizer can be loaded from.
    source: str = ""

    @property
    def looks(self) -> tuple[Look, ...]:
        """The blocks of the tower that its methods look at."""
        return tuple(look for r in (self.reducer, *self.scoring) for look in r.tower_blocks())


def attach_projector(found: Language, entry: Entry, undo: Undo) -> None:
    """Put the method of ``entry`` before the language model. Raises ``ValueError`` for evidence that is not there."""
    reducer = entry.reducer
    check_projector(found, reducer, entry.scoring)
    source = ""
    if "clip" in reducer.required():  # a wrong name shows here, not at the first prompt
        check_tower(found, joint_space(reducer.clip))  # type: ignore[attr-defined]
        source = tokenizer_source(found)
        tokenizer_of(source)
    undo.pre_hook(found.inner, _expect)
    projector = None if found.vision is None else found.vision.projector
    undo.pre_hook(found.text, functools.partial(choose, entry=replace(entry, source=source), projector=projector))
    if reducer.spec():
        undo.set(found.text, "_get_name", functools.partial(_name, type(found.text).__name__, reducer))


def check_projector(found: Language, reducer: Reducer, scoring: tuple[Reducer, ...] = ()) -> None:
    """Raise ``ValueError`` for evidence that is not there."""
    assert isinstance(reducer, Projector)
    for one in (reducer, *scoring):
        asked = [need for need in one.required() if one is reducer or need in TOWER]
        missing = [need for need in asked if need not in found.projector]
        if missing:
            raise ValueError(_cannot(found, one, missing))
    if reducer.newlines == "rank" and reducer.required():
        raise ValueError(
            f"{reducer.name}: newlines='rank' is for methods that look at embeddings alone; row ends have no patches "
            f"to take {', '.join(reducer.required())} from. Use 'keep' or 'drop'"
        )
    if hasattr(found.inner, "image_newline"):
        reducer.check_row_ends()


def _cannot(found: Language, reducer: Reducer, missing: list[str]) -> str:
    from tokenreduce.core.registry import get_class, list_methods

    names = {
        "cls": "the class token", "crops": "tiles", "tower": "attention", "clip": "CLIP features",
        "head": "the pooling head",
    }  # fmt: skip
    given = found.projector if reducer.stage == "projector" else found.evidence
    able = [
        n for n in list_methods(stage=reducer.stage)
        if all(need in given for need in get_class(n, reducer.stage).needs)
    ]  # fmt: skip
    towers = () if found.vision is None else found.vision.towers
    tower = type(towers[0]).__name__ if towers else "vision tower"
    hint = "; score='received' ranks by the attention that tokens receive" if hasattr(reducer, "score") else ""
    return (
        f"{reducer.name} needs {', '.join(names.get(m, m) for m in missing)} of the vision tower, which the {tower} of "
        f"{found.family} does not have{hint}. Methods that fit: {', '.join(able)}"
    )


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"


def compact_positions(found: Language, reducer: Reducer, windows: tuple[int | None, ...], axes: bool) -> bool:
    """Whether positions are counted anew behind ``reducer``; with ``axes`` they are places in an image. Raises
    ``ValueError`` where that is asked for and has no meaning."""
    wanted = getattr(reducer, "positions", None)
    config: Any = found.text.config
    why = None
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) or axes:
        why = "M-RoPE, whose positions are places in the image"
    elif any(w is not None for w in windows):
        why = "sliding windows, which count original positions"
    if wanted == "compact" and why is not None:
        raise ValueError(
            f"{reducer.name}: positions='compact' is not possible on {found.family}, which has {why}; "
            f"set positions='original' or leave it out"
        )
    return why is None if wanted is None else wanted == "compact"


def _expect(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on the inner model: what the tower sees within this forward comes here."""
    forward: Forward | None = kwargs.get(KEYWORD)
    if forward is not None and forward.prefill:
        ARRIVING.set(brought_in(forward).encoded)


def choose(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, entry: Entry, projector: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model: make the plan in prefill, keep the count of positions in decode."""
    forward: Forward | None = kwargs.get(KEYWORD)
    if forward is None:
        return None
    if not forward.prefill:
        return _positions_behind(args, kwargs, forward)
    columns, x, front = forward.columns, kwargs["inputs_embeds"], forward.columns.front
    ARRIVING.set(None)
    if front:  # columns are counted from the first in the cache, of which no method sees anything
        x = torch.cat([x.new_zeros(len(x), front, x.shape[-1]), x], 1)
    trace = active()
    with nullcontext() if trace is None else trace.clock():
        chosen = _choose(forward, x, entry)
        plan = None if bool(chosen.stay.all()) else Prune.from_mask(chosen.stay[:, front:])
        for part in chosen.parts:
            x = part.write(x, projector)
        x = x[:, front:] if front else x
    if trace is not None:
        trace.add(text, _told_of(chosen, plan, x.shape[1], front, entry.reducer))
    if x is not kwargs["inputs_embeds"]:
        kwargs = {**kwargs, "inputs_embeds": x}
    if plan is None:
        return args, kwargs
    columns.cut(-1, plan)
    return args, _compacted(kwargs, forward, chosen.stay) if entry.compact else kwargs


@dataclass(frozen=True, eq=False)
class Chosen:
    """The columns (B,L) that ``stay``, and the plans of all views."""

    stay: Tensor
    parts: list[Part]


def _choose(forward: Forward, x: Tensor, entry: Entry) -> Chosen:
    """Plans for the images in the embeddings ``x`` (B,L,D); what later methods want to know is noted."""
    state, reducer = forward.generation.state, entry.reducer
    assert isinstance(reducer, Projector)
    with torch.no_grad():
        images = found_in(forward, x, reducer, entry.source)
        scores = {r: scores_of(forward, x, r) for r in entry.scoring}
    state.put(TowerScores(scores))
    stay, parts = torch.ones_like(forward.columns.visual), []
    for group in images.groups:
        parts += place_group(stay, group, reducer, entry.compact)
    images.keep_out(stay)
    if "frames" in entry.told:
        frames = state.put(Frames(frames_in(forward, x)))
        for part in parts:
            part.note_frames(frames.of)
    if "places" in entry.told:
        places = state.put(Places(places_in(forward, x)))
        for part in parts:
            part.note_places(places.of)
    for table in scores.values():
        for part in parts:
            part.note_scores(table)
    return Chosen(stay, parts)


def _told_of(chosen: Chosen, plan: Plan | None, left: int, front: int, reducer: Reducer) -> Step:
    """What a trace is told; it counts the columns that the call brings."""
    parts, slots = told_of(chosen.parts, front)
    return Step("projector", 0, left if plan is None else plan.k, plan, reducer.spec(), parts, slots)


def _compacted(kwargs: dict[str, Any], forward: Forward, stay: Tensor) -> dict[str, Any]:
    """The arguments of the language model with positions that leave out what went."""
    columns, front = forward.columns, forward.columns.front
    gone = (~stay).long().cumsum(1)[:, front:]
    forward.generation.positions.shift = gone[:, -1:]
    ids = kwargs.get("position_ids")
    ids = torch.arange(front, columns.length, device=stay.device)[None] if ids is None else ids
    kwargs = {**kwargs, "position_ids": ids - gone.to(ids.device)}
    if kwargs.get("attention_mask") is None:  # else ids that stand still look like packed sequences to the library
        kwargs["attention_mask"] = torch.ones(stay.shape, dtype=torch.long, device=stay.device)
    return kwargs


def _positions_behind(
    args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compact position ids (B,Q) or (3 or 4,B,Q) of new tokens behind a shortened prompt."""
    columns, shift = forward.columns, forward.generation.positions.shift
    ids: Any = kwargs.get("position_ids")
    if columns.cut_at(-1) is None:
        return None
    given: Any = kwargs.get("inputs_embeds")
    given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
    columns.check_batch(given.shape[0])
    if shift is None:
        return None
    if ids is None:
        ids = torch.arange(forward.past, forward.past + forward.new, device=columns.visual.device)[None]
    return args, {**kwargs, "position_ids": ids - shift.to(ids.device)}
