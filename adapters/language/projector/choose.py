"""The projector stage of image/video language models: fewer visual tokens before the language model.

A method sees one image at a time: a maximal run of placeholder tokens that come from one image is an image (a tile
where a family writes text between tiles, a frame where it writes timestamps), and its views one by one where it chooses
per view. Its plan is made from the embeddings at the entry of the language model, and from what the vision tower saw
(:mod:`tokenreduce.adapters.language.projector.tower`), in a pre-hook on that. What the plan leaves is written into
columns of the
prompt, and the others go before layer 0, where the machinery of the language stage
(:mod:`tokenreduce.adapters.language.layer`)
takes over, so that masks, windows, prefixes and caches are exact in the same way.

Tokens that a plan only keeps stay bit-identical. What it mixes in the space of the tower's features goes through the
projector again.

Positions are compact or original (see :class:`~tokenreduce.algorithms.projector.Projector`). ``generate`` counts the
columns that
it gave us; compact ids are these less what was dropped before them. With compact positions outputs stand in the order
of the plan, with original ones each at the place of its representative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.families import TOWER, Language
from tokenreduce.adapters.language.generation import KEYWORD, Step
from tokenreduce.adapters.language.projector.clip_text import joint_space
from tokenreduce.adapters.language.projector.images import (
    Group,
    film_places,
    groups,
    image_places,
    take_rows,
    tokenizer_of,
)
from tokenreduce.adapters.language.projector.marks import marks_of
from tokenreduce.adapters.language.projector.seen import ARRIVING
from tokenreduce.adapters.language.projector.tower import attach_tower_evidence
from tokenreduce.algorithms.projector import Projector, share
from tokenreduce.core.evidence import ImageEvidence, Look
from tokenreduce.core.plan import Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step as TraceStep
from tokenreduce.core.trace import active
from tokenreduce.core.undo import Undo

__all__ = ["Part", "attach_projector", "check_projector", "place_group"]


def attach_projector(
    found: Language,
    reducer: Reducer,
    windows: list[int | None],
    undo: Undo,
    told: tuple[str, ...] = (),
    marking: tuple[Reducer, ...] = (),
    looking: Callable[[Language, tuple[Look, ...], Undo], None] | None = None,
    axes: bool = False,
) -> None:
    """Put ``reducer`` before the language model; ``told`` says what is to be noted of where its tokens come from:
    "films" (which frames), "places" (where in an image). ``marking`` are the language-stage methods that look at the
    tower. ``looking`` gathers its evidence in a discovered family, and ``axes`` says that positions there are places.

    Raises ``ValueError`` for evidence that is not there and for compact positions where they have no meaning.
    """
    assert isinstance(reducer, Projector)
    check_projector(found, reducer, marking)
    source = ""
    if "clip" in reducer.required():  # a wrong name shows here, not at the first prompt
        joint_space(reducer.clip)  # type: ignore[attr-defined]
        owner: Any = found.inner if found.generator is None else found.generator
        source = str(owner.config.name_or_path)
        tokenizer_of(source)
    compact = _compact(found, reducer, windows, axes)
    looks = tuple(look for r in (reducer, *marking) for look in r.tower_blocks())
    if looking is not None:
        looking(found, looks, undo)
    elif found.vision is not None:
        attach_tower_evidence(found, looks, (*reducer.required(), *reducer.optional()), undo)
    undo.pre_hook(found.inner, _expect)
    undo.pre_hook(
        found.text,
        functools.partial(
            choose,
            reducer=reducer,
            compact=compact,
            projector=None if found.vision is None else found.vision.projector,
            source=source,
            told=told,
            marking=marking,
        ),
    )
    if reducer.spec():
        undo.set(found.text, "_get_name", functools.partial(_name, type(found.text).__name__, reducer))


def check_projector(found: Language, reducer: Reducer, marking: tuple[Reducer, ...] = ()) -> None:
    """Raise ``ValueError`` for evidence that is not there."""
    assert isinstance(reducer, Projector)
    for one in (reducer, *marking):
        asked = [need for need in one.required() if one is reducer or need in TOWER]
        missing = [need for need in asked if need not in found.projector]
        if missing:
            raise ValueError(_cannot(found, one, missing))
    if reducer.newlines == "rank" and reducer.required():
        raise ValueError(
            f"{reducer.name}: newlines='rank' is for methods that look at embeddings alone; row ends have no patches "
            f"to take {', '.join(reducer.required())} from. Use 'keep' or 'drop'"
        )


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


def _compact(found: Language, reducer: Reducer, windows: list[int | None], axes: bool) -> bool:
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
    step: Step | None = kwargs.get(KEYWORD)
    if step is not None and step.prefill:
        ARRIVING.set(step.encoded)


def choose(
    text: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    reducer: Projector,
    compact: bool,
    projector: nn.Module | None,
    source: str = "",
    told: tuple[str, ...] = (),
    marking: tuple[Reducer, ...] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model: make the plan in prefill, keep the count of positions in decode."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        return None
    if not step.prefill:
        return _positions_later(args, kwargs, step)
    run, x, front = step.run, kwargs["inputs_embeds"], step.run.front
    ARRIVING.set(None)
    if front:  # columns are counted from the first in the cache, of which no method sees anything
        x = torch.cat([x.new_zeros(len(x), front, x.shape[-1]), x], 1)
    trace = active()
    with nullcontext() if trace is None else trace.clock():
        with torch.no_grad():
            found = groups(step, x, reducer, source)
            run.marks = {r: marks_of(step, x, r) for r in marking}
        stay, made = torch.ones_like(run.visual), []
        for group in found:
            made += place_group(stay, group, reducer, compact)
        for rows, columns in step.dropped:
            stay[rows, columns] = False
        if "films" in told:
            run.films = film_places(step, x)
            for part in made:
                part.note_frames(run.films)
        if "places" in told:
            run.places = image_places(step, x)
            for part in made:
                part.note_places(run.places)
        for marks in run.marks.values():
            for part in made:
                part.note_marks(marks)
        plan = None if bool(stay.all()) else Prune.from_mask(stay[:, front:])
        for part in made:
            x = part.write(x, projector)
        x = x[:, front:] if front else x
    if trace is not None:
        left = x.shape[1] if plan is None else plan.k
        parts = tuple((p.rows, p.columns - front, p.plan) for p in made)
        hosts = tuple((p.host - front).where(p.there, -1) for p in made)
        trace.add(text, TraceStep("projector", 0, left, plan, reducer.spec(), parts, hosts))
    if x is not kwargs["inputs_embeds"]:
        kwargs = {**kwargs, "inputs_embeds": x}
    if plan is None:
        return args, kwargs
    run.cut(-1, plan)
    if not compact:
        return args, kwargs
    gone = (~stay).long().cumsum(1)[:, front:]
    run.shift = gone[:, -1:]
    ids = kwargs.get("position_ids")
    ids = torch.arange(front, run.length, device=x.device)[None] if ids is None else ids
    kwargs = {**kwargs, "position_ids": ids - gone.to(ids.device)}
    if kwargs.get("attention_mask") is None:  # else ids that stand still look like packed sequences to the library
        kwargs["attention_mask"] = torch.ones(stay.shape, dtype=torch.long, device=x.device)
    return args, kwargs


@dataclass
class Part:
    """Views that a method chose from together: tokens of theirs at ``rows`` (P,1) and ``columns`` (P,N) of the prompt,
    the plan on them, and the column ``host`` (P,K) of every output; ``there`` (P,K) marks real ones."""

    rows: Tensor
    columns: Tensor
    plan: Plan
    evidence: ImageEvidence
    host: Tensor
    there: Tensor

    def note_frames(self, films: Tensor) -> None:
        """Let ``films`` (B,L,4) tell of every output the frames that it stands for; in place."""
        p, k = self.evidence.prefix, self.host.shape[1]
        to = self.plan.sources()[:, p:]
        here = films[self.rows, self.columns]
        slot = torch.where(to < 0, k, to)
        first = here.new_full((len(to), k + 1), torch.iinfo(here.dtype).max)
        first = first.scatter_reduce(1, slot, here[..., 1], "amin")[:, :k]
        last = here.new_full((len(to), k + 1), -1).scatter_reduce(1, slot, here[..., 2], "amax")[:, :k]
        own = (self.plan.representatives() - p).clamp(min=0)
        mine = here.gather(1, own.unsqueeze(-1).expand(-1, -1, 4))
        alone = last < 0  # what stands for no frame of a video
        said = torch.stack([mine[..., 0], first, last, mine[..., 3]], -1)
        said = torch.where(alone.unsqueeze(-1), mine, said)
        where = self.there.nonzero(as_tuple=True)
        films[self.rows.expand_as(self.host)[where], self.host[where]] = said[where]

    def note_places(self, places: Tensor) -> None:
        """Let ``places`` (B,L,6) tell of every output where its representative was; in place."""
        own = (self.plan.representatives() - self.evidence.prefix).clamp(min=0)
        mine = places[self.rows, self.columns].gather(1, own.unsqueeze(-1).expand(-1, -1, places.shape[-1]))
        where = self.there.nonzero(as_tuple=True)
        places[self.rows.expand_as(self.host)[where], self.host[where]] = mine[where]

    def note_marks(self, marks: Tensor) -> None:
        """Let ``marks`` (B,L) have for every output the highest of the tokens that it stands for; in place."""
        p, k = self.evidence.prefix, self.host.shape[1]
        to = self.plan.sources()[:, p:]
        here = marks[self.rows, self.columns]
        none = here.new_full((len(to), k + 1), float("-inf"))
        most = none.scatter_reduce(1, torch.where(to < 0, k, to), here, "amax")[:, :k]
        own = self.plan.representatives() - p
        most = torch.maximum(most, torch.where(own < 0, none[:, :k], here.gather(1, own.clamp(min=0))))
        most = torch.where(most == float("-inf"), 0.0, most)  # a class token
        where = self.there.nonzero(as_tuple=True)
        marks[self.rows.expand_as(self.host)[where], self.host[where]] = most[where]

    def write(self, x: Tensor, projector: nn.Module | None) -> Tensor:
        """``x`` (B,L,D) with outputs that are not their column's token already put there."""
        plan, p = self.plan, self.evidence.prefix
        own = plan.representatives() - p
        plain = plan.untouched() & (own >= 0)
        old = self.columns.gather(1, own.clamp(min=0))
        changed = self.there & ~(plain & (old == self.host))
        if not bool(changed.any()):
            return x
        where = changed.nonzero(as_tuple=True)
        at = self.rows.expand_as(self.host)[where]
        value = x.flatten(0, 1).index_select(0, at * x.shape[1] + old[where])
        mixed = changed & ~plain
        if bool(mixed.any()):
            features = self.evidence.x
            vision = features.shape[-1] != x.shape[-1] or p > 0 or self.evidence.is_vision
            made = plan.reduce(features if vision else take_rows(x, self.rows, self.columns), self.evidence.size)[mixed]
            if vision:  # what is only kept was there already
                assert projector is not None
                made = projector(made.unsqueeze(0)).squeeze(0)
            value[mixed[where]] = made.to(value.dtype)
        return x.index_put((at, self.host[where]), value)


def place_group(stay: Tensor, group: Group, reducer: Projector, compact: bool) -> list[Part]:
    """Let ``reducer`` choose for a group of images, and mark in ``stay`` (B,L) the columns that its outputs take."""
    evidence = group.evidence
    stay[group.rows, group.columns] = False
    if reducer.whole:
        evidence = evidence.in_vision(reducer.with_class()) if reducer.space == "vision" else evidence
        with torch.no_grad():
            plan = reducer.plan(evidence)
        return [_host(stay, group.rows, group.columns, plan, evidence, compact)]
    parts = evidence.parts()
    room = [w.shape[1] for w, _ in parts for _ in w]
    wanted = [None] * len(room) if reducer.keep is None else share(reducer.total(evidence.n), room)
    out, at = [], 0
    for where, part in parts:
        counts = wanted[at : at + len(where)]
        at += len(where)
        for count in dict.fromkeys(counts):
            mine = torch.tensor([i for i, c in enumerate(counts) if c == count], device=where.device)
            if count == 0:
                continue
            chosen, columns = part, group.columns[:, where[mine]].flatten(0, 1)
            if len(mine) < len(where):
                b = len(group.rows)
                chosen = part.batch_of((torch.arange(b, device=mine.device)[:, None] * len(where) + mine).flatten())
            if reducer.space == "vision" and count != part.n:
                chosen = chosen.in_vision(reducer.with_class())
            rows = group.rows.repeat_interleave(len(mine), 0)
            with torch.no_grad():
                plan = (reducer if count is None else reducer.at(count)).plan(chosen)
            out.append(_host(stay, rows, columns, plan, chosen, compact))
    return out


def _host(stay: Tensor, rows: Tensor, columns: Tensor, plan: Plan, evidence: ImageEvidence, compact: bool) -> Part:
    p, n = evidence.prefix, columns.shape[1]
    own = plan.representatives() - p
    valid = plan.validity()
    there = torch.ones_like(own, dtype=torch.bool) if valid is None else valid
    taken = torch.zeros(len(columns), n + 1, dtype=torch.bool, device=columns.device)
    taken.scatter_(1, torch.where(there & (own >= 0), own, n), True)
    if p:  # the class token has no column: it takes the first that is free
        free = (~taken[:, :n]).long().argmax(1, keepdim=True)
        at_class = there & (own < 0)
        place = torch.where(own < 0, free, own)
        taken.scatter_(1, torch.where(at_class.any(1, keepdim=True), free, n), True)
    else:
        place = own
    if compact:  # outputs in the order of the plan, in the columns that are left
        order = (~there).long().argsort(dim=1, stable=True)
        ascending = torch.where(there, place, n).sort(dim=1).values
        place = torch.zeros_like(place).scatter(1, order, ascending)
    host = columns.gather(1, place.clamp(max=n - 1))
    marked = there.nonzero(as_tuple=True)
    stay[rows.expand_as(host)[marked], host[marked]] = True
    return Part(rows, columns, plan, evidence, host, there)


def _positions_later(
    args: tuple[Any, ...], kwargs: dict[str, Any], step: Step
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compact position ids (B,Q) or (3 or 4,B,Q) of new tokens behind a shortened prompt."""
    run = step.run
    ids: Any = kwargs.get("position_ids")
    if run.cut_at(-1) is None:
        return None
    given: Any = kwargs.get("inputs_embeds")
    given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
    run.check_batch(given.shape[0])
    if run.shift is None:
        return None
    if ids is None:
        ids = torch.arange(step.past, step.past + step.new, device=run.visual.device)[None]
    return args, {**kwargs, "position_ids": ids - run.shift.to(ids.device)}
