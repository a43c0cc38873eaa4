"""The prompt of a discovered model: its features and columns before they enter the model, and what is left of them.

The model gets a shorter prompt: ids, masks and positions of the columns that are left, and the features of the
placeholders among them. Rows of a batch that keep fewer are filled on the left with columns that nobody sees. So
everything that a model makes of ids and positions is made of what is left, by the model.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.generation import Forward, Generation, Positions, cache_in
from tokenreduce.adapters.language.generic.discover import KINDS, parameters_of
from tokenreduce.adapters.language.generic.features import Features, read
from tokenreduce.adapters.language.generic.masks import prompt_mask
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.projector.brought import Brought
from tokenreduce.adapters.language.projector.images import found_in
from tokenreduce.adapters.language.projector.placing import Part, place_group, told_of
from tokenreduce.adapters.language.projector.seen import encoded_in
from tokenreduce.adapters.language.prompt import padding_in
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.plan import Prune
from tokenreduce.core.trace import Step, active

__all__ = ["Setting", "begin", "positions_of"]


@dataclass(frozen=True)
class Setting:
    """What a patch knows: the method, the placeholders by kind, and what the call at which columns go takes."""

    reducer: Projector
    compact: bool
    ids: dict[str, int]
    methods: str
    #: Whether the call takes position ids, and features that are made already.
    positions: bool
    ready: bool
    #: A token that is text, for columns that stand for nothing.
    blank: int


@dataclass(frozen=True)
class Begun:
    """A call that brings a prompt: its arguments ``given``, with what is left of it; the ``forward`` that it is, None
    without features; and the features that a call is answered with which makes them itself."""

    given: dict[str, Any]
    forward: Forward | None = None
    answers: dict[str, Any] = field(default_factory=dict)


def begin(inner: Any, given: dict[str, Any], setting: Setting) -> Begun:
    """What is left of the prompt that a call brings."""
    ids: Tensor = given["input_ids"]
    found = _features(inner, given, setting.ids, ids)
    if not found:
        return Begun(given)
    forward = _forward(inner, given, found, setting.methods)
    generation = forward.generation
    x = _entry(inner, ids, found, "text" in setting.reducer.required())
    stay, made = _choose(inner, forward, x, setting)
    for part in made:
        x = part.write(x, None)
    left = [(f, here, stay & here) for f, here in found]
    outputs = {f.kind: f.output for f, _, _ in left}
    if not bool(stay.all()):
        outputs = {f.kind: f.cut(mine[here].nonzero().flatten(), x[mine]) for f, here, mine in left}
    if not bool(stay.all()):
        cut = generation.columns.cut(-1, Prune.from_mask(stay))
        if setting.compact:
            generation.positions.shift = (~stay).long().sum(1, keepdim=True)
        given = _left(inner, given, cut, stay, setting)  # needs the grids, which go below
    return _handed(inner, given, outputs, setting, forward)


def _forward(inner: Any, given: dict[str, Any], found: list[tuple[Features, Tensor]], methods: str) -> Forward:
    """The forward of a call with the features ``found``; it begins a generation."""
    ids: Tensor = given["input_ids"]
    encoded = {f.kind: e for f, _ in found if (e := encoded_in(f.output)) is not None and e.entries}
    newline = getattr(inner, "image_newline", None)
    brought = Brought({f.kind: here for f, here in found}, encoded, ids=ids, newline=newline)
    padding = padding_in(given.get("attention_mask"), ids.shape[0], ids.shape[1], slides=False)
    columns = Columns(brought.visual, padding, chosen_by=methods)
    forward = Forward(Generation(columns, Positions(ids.shape[1])), "prefill")
    forward.state.put(brought)
    return forward


def _features(inner: Any, given: dict[str, Any], tokens: dict[str, int], ids: Tensor) -> list[tuple[Features, Tensor]]:
    """The features of every kind that a call brings, made where only pixels are given, and (B,L) their columns."""
    ready = given.get("mm_encoder_outputs") or {}
    made = {kind: ready[kind] if ready.get(kind) is not None else _make(inner, kind, given) for kind in KINDS}
    made = {kind: output for kind, output in made.items() if output is not None}
    places = {kind: ids == token for kind, token in tokens.items()}
    out = []
    for kind, output in made.items():
        here = places.get(kind)
        others = [p for k, p in places.items() if k != kind and k not in made]
        if here is None or not bool(here.any()):  # frames of a video at places for images
            here = others[0] if others else here
        if here is None:
            raise ValueError(f"{type(inner).__name__} names no token that stands for a feature of a kind {kind!r}")
        if len(made) > 1 and len({tokens.get(k) for k in made}) == 1:
            raise ValueError(
                f"images and videos have the same placeholder in {type(inner).__name__}, so that their features are "
                f"not told apart; give them in batches of their own"
            )
        if len(output) and not (bool(here.any())):
            continue
        out.append((read(kind, output, int(here.sum())), here))
    return out


def _make(inner: Any, kind: str, given: dict[str, Any]) -> Any:
    """The features of ``kind`` from the pixels among ``given``, None where there are none."""
    function = getattr(inner, f"get_{kind}_features", None)
    if function is None:
        return None
    names = parameters_of(getattr(type(inner), f"get_{kind}_features"))[1:]
    if given.get(names[0]) is None:
        return None
    return function(**{n: given[n] for n in names if given.get(n) is not None}, return_dict=True)


def _entry(inner: Any, ids: Tensor, found: list[tuple[Features, Tensor]], text: bool) -> Tensor:
    """(B,L,C): features at their columns and, where a method asks, embeddings of ``text`` at the others."""
    first = found[0][0].rows
    x = first.new_zeros(*ids.shape, first.shape[-1])
    if text:
        table = inner.get_input_embeddings()
        visual = torch.stack([here for _, here in found]).any(0)
        words = table(ids.masked_fill(visual, 0).clamp(max=table.num_embeddings - 1)).detach()
        if words.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{type(inner).__name__} makes features of {x.shape[-1]} channels and embeddings of "
                f"{words.shape[-1]}, which no method can compare; choose one that does not read the question: divprune"
            )
        x = words.to(x)
    for features, here in found:
        x = x.masked_scatter(here.unsqueeze(-1), features.rows.to(x))
    return x


def _choose(inner: Any, forward: Forward, x: Tensor, setting: Setting) -> tuple[Tensor, list[Part]]:
    """(B,L) the columns that stay, and the plans."""
    trace, made = active(), []
    stay = torch.ones_like(forward.columns.visual)
    with nullcontext() if trace is None else trace.clock():
        with torch.no_grad():
            images = found_in(forward, x.detach(), setting.reducer)
        for group in images.groups:
            made += place_group(stay, group, setting.reducer, setting.compact)
        images.keep_out(stay)
    if trace is not None:
        plan = None if bool(stay.all()) else Prune.from_mask(stay)
        left = x.shape[1] if plan is None else plan.k
        trace.add(inner, Step("projector", 0, left, plan, setting.reducer.spec(), *told_of(made)))
    return stay, made


def _handed(inner: Any, given: dict[str, Any], outputs: dict[str, Any], setting: Setting, forward: Forward) -> Begun:
    """The arguments with ready features in place of pixels, or the pixels and what is made of them."""
    if not setting.ready:
        return Begun(given, forward, outputs)
    ready = given.get("mm_encoder_outputs") or {}
    used = {n for kind in outputs if ready.get(kind) is None for n in _pixels(inner, kind)}
    kept = {n: v for n, v in given.items() if n not in used}
    return Begun({**kept, "mm_encoder_outputs": {**ready, **outputs}}, forward)


def _pixels(inner: Any, kind: str) -> tuple[str, ...]:
    """What only ``get_image_features`` or ``get_video_features`` needs."""
    return parameters_of(getattr(type(inner), f"get_{kind}_features"))[1:]


def positions_of(inner: Any, given: dict[str, Any], columns: Tensor) -> Tensor:
    """Position ids of the ``columns`` (N,) of a call (B,N) or (axes,B,N), which the model counts itself where it is
    given none: by its own function where it has one, else one per column, dropped ones included."""
    ids = given.get("position_ids")
    if isinstance(ids, Tensor):
        return ids
    count = getattr(inner, "compute_3d_position_ids", None)
    if count is not None:
        tokens = given["input_ids"]
        known = {**given, "inputs_embeds": torch.empty(*tokens.shape, 0, device=tokens.device)}
        known["cache"] = known["past_key_values"] = cache_in(given)
        names = parameters_of(type(inner).compute_3d_position_ids)[1:]
        made: Tensor | None = count(**{n: known.get(n) for n in names if n != "kwargs"})
        if made is not None:
            return made
    return columns[None]


def _left(inner: Any, given: dict[str, Any], cut: Cut, stay: Tensor, setting: Setting) -> dict[str, Any]:
    """The arguments of the columns that ``cut`` left."""
    (batch, length), left = stay.shape, cut.columns
    out = dict(given)
    if setting.positions:
        ids = positions_of(inner, given, torch.arange(length, device=left.at.device))
        if setting.compact:
            if ids.dim() > 2:
                raise ValueError(f"positions='compact' is not possible with positions on {ids.shape[0]} axes")
            ids = ids - (~stay).long().cumsum(1).to(ids.device)
        out["position_ids"] = _columns(ids, left, 0)
    own = {n for kind in KINDS if hasattr(inner, f"get_{kind}_features") for n in _pixels(inner, kind)}
    for name, value in given.items():
        if name in ("attention_mask", "position_ids") or name in own or not isinstance(value, Tensor):
            continue
        along = value.dim() > 1 and value.shape[1] == length and value.shape[0] in (1, batch)
        if along and value.dim() == 2 and not value.is_floating_point():
            blank = setting.blank if name == "input_ids" else -100 if name == "labels" else 0
            out[name] = _columns(value, left, blank)
        elif along or (value.dim() == 1 and len(value) == length):
            raise ValueError(
                f"{name} {tuple(value.shape)} runs along the columns of the prompt in a way that is not known; leave "
                f"it out, so that {type(inner).__name__} makes it of the tokens that are left"
            )
    if isinstance(out.get("labels"), Tensor):  # nothing in front of a row's first token predicts it
        real = torch.ones_like(left.at, dtype=torch.bool) if cut.seen is None else cut.seen
        first = real.long().argmax(1, keepdim=True)
        out["labels"] = out["labels"].scatter(1, first, -100)
    out["attention_mask"] = prompt_mask(given.get("attention_mask"), cut, batch, length)
    return out


def _columns(t: Tensor, left: ColumnIndex, blank: int) -> Tensor:
    """``t`` (...,B or 1,L) at the columns ``left`` (B,K), ``blank`` where there is none."""
    index, valid = left.at.to(t.device), left.there
    shape = (*t.shape[:-2], *index.shape)
    out = t.expand(*t.shape[:-2], len(index), -1).gather(-1, index.expand(shape))
    return out if valid is None else out.masked_fill(~valid.to(t.device), blank)
