"""Patches of images of any size in one row, as Qwen's vision towers have them: which of them are left, and where.

Such a tower makes one visual token of every 2x2 patches, its *unit*, which lie side by side in the row. Only whole
units are merged or dropped: a method sees units as tokens, view by view (an image or a frame), views of the same size
together as a batch. :class:`Packed` is for such a row what :class:`~tokenreduce.adapters.encoders.state.State` is for a
batch. Units that are left stand in the order of the places of their representatives, so that windows and frames stay
contiguous; a merged unit is in the window of its representative.

Methods that merge across the frames of a video see several of its views as one row. A merged unit still attends in the
window of its representative only, but every window that has a part in it sees it as a key, at the place of its
representative, under proportional attention with the logarithm of that part; so no window misses anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.joint import check_frames
from tokenreduce.adapters.encoders.state import State, full_plan, power_of
from tokenreduce.core.plan import Chain, Identity, Merge, Plan, Pool, Prune

__all__ = ["Layout", "Packed", "Part", "patchwise"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the units of every view are in the row: ``numbers[i]`` (G) are the views of (rows, columns) units
    ``shapes[i]``, ``places[i]`` (G,U) the places of their units in row-major order. A unit is ``unit`` patches.

    With (frames, rows, columns) in ``shapes[i]`` so many views of a video, one after the other in ``numbers[i]``, are
    one of the G, with the units of all of them."""

    unit: int
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    places: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, grids: list[list[int]], merge: int, order: Tensor | None, device: torch.device | str, frames: int = 1
    ) -> Layout:
        """From (frames, rows, columns) of patches of every image and the ``order`` (N,) in which the tower puts
        its units (window attention), None where it leaves them. ``frames`` of a video belong together.

        Raises ``ValueError`` for videos that cannot be cut into so many frames each.
        """
        starts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        view = start = 0
        for t, h, w in grids:
            count = check_frames(frames, t, "temporal positions")
            shape = (h // merge, w // merge) if count == 1 else (count, h // merge, w // merge)
            for _ in range(t // count):
                starts.setdefault(shape, []).append((view, start))
                view, start = view + count, start + math.prod(shape)
        back = torch.arange(start, device=device) if order is None else order.to(device).argsort()
        places = tuple(
            back[torch.tensor([s for _, s in f], device=device)[:, None] + torch.arange(math.prod(s), device=device)]
            for s, f in starts.items()
        )
        numbers = tuple(tuple(v + i for v, _ in f for i in range(_views(s))) for s, f in starts.items())
        return cls(merge * merge, tuple(starts), numbers, places)

    @property
    def views(self) -> int:
        return sum(map(len, self.numbers))

    @property
    def joint(self) -> bool:
        """Whether several views are one row somewhere."""
        return any(_views(shape) > 1 for shape in self.shapes)


def _views(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else 1


@dataclass(frozen=True, eq=False)
class Part:
    """Views of the same size: the state of their units (G,K), and ``where`` (G,K) these are among those in the row
    (0 for slots that are not there)."""

    state: State
    where: Tensor

    @property
    def units(self) -> int:
        """How many are left, over all views."""
        return self.where.numel() if self.state.valid is None else int(self.state.valid.sum())

    def take(self, t: Tensor) -> Tensor:
        """(n,...) of the units in the row to (G,K,...)."""
        return t[self.where]


class Packed:
    """What is known about the units of one activation tensor (P,C). Never changed in place.

    ``at`` (n,) are the places that the n units in the row had at the tower's entry, None while no plan has acted.
    """

    __slots__ = ("at", "layout", "parts")

    def __init__(self, layout: Layout, parts: tuple[Part, ...], at: Tensor | None = None) -> None:
        self.layout, self.parts, self.at = layout, parts, at

    @classmethod
    def entry(cls, layout: Layout) -> Packed:
        pairs = zip(layout.places, layout.shapes, strict=True)
        return cls(layout, tuple(Part(State(place.shape[1], grid=shape), place) for place, shape in pairs))

    @property
    def lasting(self) -> Packed:
        """What is known behind the tower, where patches that were set aside in it are back."""
        return self

    # -- in a block ------------------------------------------------------------------------------------------------
    def every(self, x: Tensor, layer: int) -> Tensor | None:
        """All patches, where some are set aside and attention of ``layer`` is over all; else None."""
        return None

    def take(self, x: Tensor) -> Tensor:
        """All patches to those that are not set aside."""
        return x

    def complete(self, x: Tensor) -> tuple[Tensor, Packed]:
        """All patches with what is known of them, where some are set aside."""
        return x, self

    def taken(self) -> Tensor | None:
        """(P,) places at the tower's entry of the patches that are left, None where all are."""
        return None if self.at is None else _numbered(self.at, self.layout.unit)

    def after(self, x: Tensor, plans: list[Plan], proportional: float) -> tuple[Tensor, Packed]:
        """``x`` (P,C) and the state of the units that ``plans``, one for each of :attr:`parts`, leave."""
        m = self.layout.unit
        units = x.reshape(-1, m * x.shape[-1])
        rows, places, there, states = [], [], [], []
        for part, place, plan in zip(self.parts, self.layout.places, plans, strict=True):
            mine, state = part.take(units), part.state
            if not plan.is_identity:
                mine, state = plan.reduce(mine, state.size), state.after(plan, proportional)
            rows.append(mine.flatten(0, 1))
            places.append(place if state.origin is None else place.gather(1, state.origin))
            there.append(torch.ones_like(places[-1], dtype=torch.bool) if state.valid is None else state.valid)
            states.append(state)
        place, present = torch.cat([p.flatten() for p in places]), torch.cat([t.flatten() for t in there])
        slots = present.nonzero().flatten()
        slots = slots[place[slots].argsort(stable=True)]
        where = torch.zeros_like(place).scatter(0, slots, torch.arange(len(slots), device=place.device))
        each = where.split([p.numel() for p in places])
        parts = tuple(Part(s, w.view(p.shape)) for s, w, p in zip(states, each, places, strict=True))
        left = torch.cat(rows)[slots].reshape(-1, x.shape[-1])
        return left, Packed(self.layout, parts, place[slots])

    def means(self, t: Tensor) -> Tensor:
        """(P,...) of patches to the mean of every unit (n,...)."""
        return t.reshape(-1, self.layout.unit, *t.shape[1:]).mean(1)

    def rows(self, table: Tensor) -> Tensor:
        """Rows of a table (P at the entry, d) for the patches that are left: those of the representatives."""
        if self.at is None:
            return table
        return table.reshape(-1, self.layout.unit, table.shape[-1])[self.at].flatten(0, 1)

    def bounds(self, cu_seqlens: Tensor) -> Tensor:
        """Cumulative lengths of windows or frames for the patches that are left; empty ones go."""
        if self.at is None:
            return cu_seqlens
        edges = (cu_seqlens // self.layout.unit).to(self.at)
        return (torch.searchsorted(self.at, edges) * self.layout.unit).unique_consecutive().to(cu_seqlens.dtype)

    def windows(self, bounds: Tensor) -> Tensor | None:
        """(n,) window of every unit, from :meth:`bounds`; None where every view is one window."""
        if len(bounds) - 1 == self.layout.views:  # windows never reach across views
            return None
        lengths = bounds.diff().long() // self.layout.unit
        return torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)

    def bias(self) -> Tensor | None:
        """(P,) log sizes of the patches' units, a key bias for the blocks behind a merge; None where all count one."""
        heavy = [p for p in self.parts if p.state.proportional and p.state.size is not None]
        if not heavy:
            return None
        assert self.at is not None
        out = torch.zeros(len(self.at), device=self.at.device)
        for part in heavy:
            log, valid = part.state.size.float().log(), part.state.valid  # type: ignore[union-attr]
            where = part.where if valid is None else part.where[valid]
            out[where] = log if valid is None else log[valid]
        return out.repeat_interleave(self.layout.unit)

    # -- across frames -----------------------------------------------------------------------------------------------
    def seen(self, cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """For every window in :meth:`bounds` the patches (M,) in the row that it sees, and what to add to the logits of
        each; None where the windows see what is in them and nothing else."""
        if self.at is None or not self.layout.joint:
            return None
        n, m = len(self.at), self.layout.unit
        edges = (cu_seqlens // m).to(self.at)
        codes, biases = [], []
        for part, place, shape in zip(self.parts, self.layout.places, self.layout.shapes, strict=True):
            state, row = part.state, part.where
            if _views(shape) > 1:
                source = _sources(state, place)
                there, row = source >= 0, row.gather(1, source.clamp(min=0))
                size = torch.ones_like(place, dtype=torch.float32)
            else:
                place = place if state.origin is None else place.gather(1, state.origin)
                there = torch.ones_like(place, dtype=torch.bool) if state.valid is None else state.valid
                size = torch.ones_like(place, dtype=torch.float32) if state.size is None else state.size.float()
            code = _window(place[there], edges) * n + row[there]
            code, at = code.unique(return_inverse=True)
            share = torch.zeros(len(code), device=code.device).index_add_(0, at, size[there])
            codes.append(code)
            biases.append(power_of(share.log(), state.proportional))
        code, order = torch.cat(codes).sort()
        window, unit = code // n, code % n
        lengths = torch.bincount(window, minlength=len(edges) - 1).tolist()
        patches = (unit[:, None] * m + torch.arange(m, device=unit.device)).flatten()
        bias = torch.cat(biases)[order].repeat_interleave(m)
        found = zip(*(t.split([k * m for k in lengths]) for t in (patches, bias)), strict=True)
        own = torch.searchsorted(self.at, edges).diff().tolist()
        return [pair for pair, queries in zip(found, own, strict=True) if queries]

    def mask(self, i: int, cu_seqlens: Tensor) -> Tensor:
        """(G,1,K,K) what the units of part ``i``, which are of several views, see of each other: logarithms of the
        parts that windows have, or 0 where these do not count, and -inf."""
        part, place = self.parts[i], self.layout.places[i]
        edges = (cu_seqlens // self.layout.unit).to(place)
        state, source = part.state, _sources(part.state, place)
        home = place if state.origin is None else place.gather(1, state.origin)
        k, out = home.shape[1], []
        for mine, to, own in zip(_window(place, edges), source, _window(home, edges), strict=True):
            _, number = torch.cat([mine, own]).unique(return_inverse=True)
            there, window = to >= 0, number[: len(mine)]
            share = torch.zeros(int(number.max()) + 1, k, device=place.device)
            share.index_put_((window[there], to[there]), torch.ones((), device=place.device), accumulate=True)
            out.append(share[number[len(mine) :]])
        seen = torch.stack(out)
        bias = power_of(seen.log(), state.proportional)
        if state.valid is not None:  # rows of slots that are not there must not be empty
            bias = torch.where(state.valid.unsqueeze(-1), bias, 0.0)
        return bias.unsqueeze(1)

    # -- behind the tower --------------------------------------------------------------------------------------------
    def expand(self, y: Tensor, each: int) -> Tensor:
        """(n*each,C) back to all units (N*each,C), in the order of the row: merged units are copied, dropped ones
        take the mean of what is left of their view."""
        if self.at is None:
            return y
        units = y.reshape(-1, each * y.shape[-1])
        full = []
        for part in self.parts:
            mine, plan, valid = part.take(units), full_plan(part.state), part.state.valid
            if plan is not None and not plan.is_identity:
                here = torch.ones_like(mine[..., :1]) if valid is None else valid.unsqueeze(-1).to(mine.dtype)
                mean = (mine * here).sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
                mine = torch.where((plan.sources() < 0).unsqueeze(-1), mean, plan.expand(mine))
            full.append(mine.flatten(0, 1))
        order = torch.cat([p.flatten() for p in self.layout.places]).argsort()
        return torch.cat(full)[order].reshape(-1, y.shape[-1])

    def _find(self, views: Tensor) -> tuple[Part, Tensor, int]:
        """The part that ``views`` (V,), all of the same size, belong to, their rows among its views, and the units of
        each at the entry."""
        wanted = views.tolist()
        i = next(i for i, mine in enumerate(self.layout.numbers) if wanted[0] in mine)
        row = {view: g for g, view in enumerate(self.layout.numbers[i])}
        units = math.prod(self.layout.shapes[i][-2:])
        return self.parts[i], torch.tensor([row[v] for v in wanted], device=views.device), units

    def left(self, views: Tensor) -> Tensor | None:
        """(V,patches) bool of ``views``: patches of units that are the place of one that is left; None when all are."""
        part, rows, units = self._find(views)
        plan = full_plan(part.state)
        if plan is None or plan.is_identity:
            return None
        return plan.places().reshape(-1, units)[rows].repeat_interleave(self.layout.unit, 1)

    def sizes(self, views: Tensor) -> Tensor | None:
        """(V,patches) number of units behind the unit of every patch of ``views``, None when each is one."""
        part, rows, units = self._find(views)
        plan, size = full_plan(part.state), part.state.size
        if plan is None or size is None:
            return None
        full = plan.expand(size.unsqueeze(-1)).squeeze(-1)
        return full.reshape(-1, units)[rows].repeat_interleave(self.layout.unit, 1)

    def patches(self, views: Tensor) -> tuple[Tensor, State, Plan | None]:
        """(V,k) places of the patches of ``views`` in the row now, their state, and the plan that led there; of views
        that are rows of their own."""
        part, rows, _ = self._find(views)
        m, state, plan = self.layout.unit, part.state, full_plan(part.state)

        def each(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows].repeat_interleave(m, 1)

        where = _numbered(part.where[rows], m)
        now = State(state.entry * m, each(state.size), each(state.valid), proportional=state.proportional)
        return where, now, None if plan is None else patchwise(plan.rows_at(rows), m)


def _sources(state: State, place: Tensor) -> Tensor:
    """(G,N) for every unit at the entry, at ``place`` (G,N), the one among those left that it is part of, or -1."""
    plan = full_plan(state)
    own = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return own if plan is None or plan.is_identity else plan.sources()


def _window(place: Tensor, edges: Tensor) -> Tensor:
    """Windows of units at places ``place``; ``edges`` are the cumulative numbers of units in windows."""
    return torch.searchsorted(edges, place.contiguous(), right=True) - 1


def _numbered(index: Tensor, m: int) -> Tensor:
    """Numbers of units (B,K) to those of their patches (B,K*m)."""
    return (index.unsqueeze(-1) * m + torch.arange(m, device=index.device)).flatten(-2)


def patchwise(plan: Plan, m: int) -> Plan:
    """A plan on units as one on their ``m`` patches each: patch i of a unit goes where patch i of its output is.

    Weighted by sizes, or keeping norms, this is what the plan does to units as vectors of all their patches, except
    that norms are then those of patches.
    """

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat_interleave(m, 1)

    if isinstance(plan, Identity):
        return Identity(plan.n * m, plan.batch, plan.device)
    if isinstance(plan, Prune):
        return Prune(plan.n * m, _numbered(plan.keep, m), rows(plan.valid))
    if isinstance(plan, Merge):
        return replace(
            plan, n=plan.n * m, keep=_numbered(plan.keep, m), src=_numbered(plan.src, m), dst=_numbered(plan.dst, m),
            weights=rows(plan.weights), size_scale=rows(plan.size_scale), valid=rows(plan.valid),
        )  # fmt: skip
    if isinstance(plan, Chain):
        return Chain(plan.n * m, tuple(patchwise(p, m) for p in plan.plans))
    assert isinstance(plan, Pool)
    eye = torch.eye(m, dtype=plan.weights.dtype, device=plan.device)
    weights = (plan.weights[:, :, None, :, None] * eye[:, None]).flatten(3).flatten(1, 2)
    keep = None if plan.keep is None else _numbered(plan.keep, m)
    return replace(plan, n=plan.n * m, weights=weights, valid=rows(plan.valid), keep=keep)
