"""What a method chose among the tokens of images, and the columns of the prompt that its outputs take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.columns import Views
from tokenreduce.adapters.language.indices import ColumnIndex, TokenIndex
from tokenreduce.adapters.language.projector.gathered import Group
from tokenreduce.algorithms.projector import Projector, share
from tokenreduce.core.evidence import ImageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.trace import ViewPlan

__all__ = ["Part", "place_group", "told_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """Views that a method chose from together, the plan on their tokens, and the column that each of its outputs takes,
    ``slots`` (P,K)."""

    views: Views
    plan: Plan
    evidence: ImageEvidence
    slots: ColumnIndex

    def own(self) -> TokenIndex:
        """(P,K) the token that each output takes the place of."""
        return TokenIndex(self.plan.representatives() - self.evidence.prefix, self.slots.there)

    def note_frames(self, frames: Tensor) -> None:
        """Let ``frames`` (B,L,4) tell of every output the frames that it stands for; in place."""
        p, k = self.evidence.prefix, self.slots.k
        to = self.plan.sources()[:, p:]
        here = self.views.read(frames)
        slot = torch.where(to < 0, k, to)
        first = here.new_full((len(to), k + 1), torch.iinfo(here.dtype).max)
        first = first.scatter_reduce(1, slot, here[..., 1], "amin")[:, :k]
        last = here.new_full((len(to), k + 1), -1).scatter_reduce(1, slot, here[..., 2], "amax")[:, :k]
        mine = self._of_own(here)
        alone = last < 0  # what stands for no frame of a video
        said = torch.stack([mine[..., 0], first, last, mine[..., 3]], -1)
        self.views.write(frames, self.slots, torch.where(alone.unsqueeze(-1), mine, said))

    def note_places(self, places: Tensor) -> None:
        """Let ``places`` (B,L,6) tell of every output where its representative was; in place."""
        self.views.write(places, self.slots, self._of_own(self.views.read(places)))

    def note_scores(self, scores: Tensor) -> None:
        """Let ``scores`` (B,L) have for every output the highest of the tokens that it stands for; in place."""
        p, k = self.evidence.prefix, self.slots.k
        to = self.plan.sources()[:, p:]
        here = self.views.read(scores)
        none = here.new_full((len(to), k + 1), float("-inf"))
        most = none.scatter_reduce(1, torch.where(to < 0, k, to), here, "amax")[:, :k]
        own = self.own().at
        most = torch.maximum(most, torch.where(own < 0, none[:, :k], here.gather(1, own.clamp(min=0))))
        most = torch.where(most == float("-inf"), 0.0, most)  # a class token
        self.views.write(scores, self.slots, most)

    def _of_own(self, here: Tensor) -> Tensor:
        """(P,K,n) of what is known of the tokens, ``here`` (P,N,n), that of those whose place outputs take."""
        own = self.own().at.clamp(min=0)
        return here.gather(1, own.unsqueeze(-1).expand(-1, -1, here.shape[-1]))

    def write(self, x: Tensor, projector: nn.Module | None) -> Tensor:
        """``x`` (B,L,D) with outputs that are not their column's token already put there."""
        plan, p, slots, own = self.plan, self.evidence.prefix, self.slots, self.own()
        plain = plan.untouched() & (own.at >= 0)
        old = self.views.of(own).at
        changed = slots.real() & ~(plain & (old == slots.at))
        if not bool(changed.any()):
            return x
        where = changed.nonzero(as_tuple=True)
        at = self.views.rows.expand_as(slots.at)[where]
        value = x.flatten(0, 1).index_select(0, at * x.shape[1] + old[where])
        mixed = changed & ~plain
        if bool(mixed.any()):
            features = self.evidence.x
            vision = features.shape[-1] != x.shape[-1] or p > 0 or self.evidence.is_vision
            made = plan.reduce(features if vision else self.views.embeddings(x), self.evidence.size)[mixed]
            if vision:  # what is only kept was there already
                assert projector is not None
                made = projector(made.unsqueeze(0)).squeeze(0)
            value[mixed[where]] = made.to(value.dtype)
        return x.index_put((at, slots.at[where]), value)


def place_group(stay: Tensor, group: Group, reducer: Projector, compact: bool) -> list[Part]:
    """Let ``reducer`` choose for a group of images, and mark in ``stay`` (B,L) the columns that its outputs take."""
    evidence, views = group.evidence, group.views
    stay[views.rows, views.columns] = False
    if reducer.whole:
        evidence = evidence.in_vision(reducer.with_class()) if reducer.space == "vision" else evidence
        with torch.no_grad():
            plan = reducer.plan(evidence)
        return [_place(stay, views, plan, evidence, compact)]
    out = []
    for some, chosen, count in _views_of(group, reducer):
        if reducer.space == "vision" and count != chosen.n:
            chosen = chosen.in_vision(reducer.with_class())
        with torch.no_grad():
            plan = (reducer if count is None else reducer.at(count)).plan(chosen)
        out.append(_place(stay, some, plan, chosen, compact))
    return out


def _views_of(group: Group, reducer: Projector) -> Iterator[tuple[Views, ImageEvidence, int | None]]:
    """The views of a group that are chosen from in one call, and how many tokens each of them keeps."""
    views, parts = group.views, group.evidence.parts()
    room = [w.shape[1] for w, _ in parts for _ in w]
    wanted = [None] * len(room) if reducer.keep is None else share(reducer.total(group.evidence.n), room)
    at = 0
    for where, part in parts:
        counts = wanted[at : at + len(where)]
        at += len(where)
        for count in dict.fromkeys(counts):
            if count == 0:
                continue
            mine = torch.tensor([i for i, c in enumerate(counts) if c == count], device=where.device)
            chosen, columns = part, views.columns[:, where[mine]].flatten(0, 1)
            if len(mine) < len(where):
                b = len(views.rows)
                chosen = part.batch_of((torch.arange(b, device=mine.device)[:, None] * len(where) + mine).flatten())
            yield Views(views.rows.repeat_interleave(len(mine), 0), columns), chosen, count


def _place(stay: Tensor, views: Views, plan: Plan, evidence: ImageEvidence, compact: bool) -> Part:
    """Give every output of ``plan`` a column: that of its representative or, with ``compact`` positions, those columns
    in the order of the plan."""
    own = plan.representatives() - evidence.prefix
    valid = plan.validity()
    there = torch.ones_like(own, dtype=torch.bool) if valid is None else valid
    place = _with_class(own, there, views.n) if evidence.prefix else own
    if compact:
        order = (~there).long().argsort(dim=1, stable=True)
        ascending = torch.where(there, place, views.n).sort(dim=1).values
        place = torch.zeros_like(place).scatter(1, order, ascending)
    slots = views.of(TokenIndex(place, there))
    views.write(stay, slots, True)
    return Part(views, plan, evidence, slots)


def _with_class(own: Tensor, there: Tensor, n: int) -> Tensor:
    """(P,K) places for outputs whose representatives are ``own`` (P,K): a class token has no column of its own, and
    takes the first that is free."""
    taken = torch.zeros(len(own), n + 1, dtype=torch.bool, device=own.device)
    taken.scatter_(1, torch.where(there & (own >= 0), own, n), True)
    free = (~taken[:, :n]).long().argmax(1, keepdim=True)
    return torch.where(own < 0, free, own)


def told_of(parts: Sequence[Part], front: int = 0) -> tuple[tuple[ViewPlan, ...], tuple[Tensor, ...]]:
    """``parts`` and slots of a trace's step, which counts columns from ``front`` on."""
    plans = tuple(ViewPlan(p.views.rows, p.views.columns - front, p.plan) for p in parts)
    return plans, tuple((p.slots.at - front).where(p.slots.real(), -1) for p in parts)
