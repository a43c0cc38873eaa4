"""Methods that set single patches aside in towers that pack images into one row; see
:mod:`tokenreduce.adapters.encoders.rebuilding`.

Units of a merger may lose some of their patches, since all come back before anything reads units.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.packed import Packed, Part
from tokenreduce.adapters.encoders.rebuilding import entered_of
from tokenreduce.adapters.encoders.site import Site
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Plan, Rebuild
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step, Trace, active

__all__ = ["Chosen", "SetsAside", "Sparse"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Patches that a method saw together: their places (G,U) among all in the row, which of these are ``there``, the
    plan on them (None where all stay), and the places (G,K) of those that stay among all that do."""

    rows: Tensor
    there: Tensor | None
    plan: Rebuild | None
    where: Tensor

    def flat(self, t: Tensor) -> Tensor:
        """(G,U,...) to those that are there (n,...)."""
        return t.flatten(0, 1) if self.there is None else t[self.there]

    @property
    def left(self) -> int:
        """How many stay."""
        if self.plan is None:
            return len(self.flat(self.rows))
        return self.where.numel() if self.plan.valid is None else int(self.plan.valid.sum())


class Sparse(Packed):
    """Patches of a row of which some are set aside; ``base`` is the row with all, ``kept`` (K,) are the places in there
    of those that are left, ascending, and blocks before ``until`` attend over all."""

    __slots__ = ("base", "chosen", "kept", "until")

    def __init__(self, base: Packed, chosen: tuple[Chosen, ...], kept: Tensor, until: int) -> None:
        super().__init__(base.layout, base.parts, kept)
        self.base, self.chosen, self.kept, self.until = base, chosen, kept, until

    @property
    def lasting(self) -> Packed:
        return self.base

    def take(self, x: Tensor) -> Tensor:
        """All patches (P,C) to those that are left (K,C)."""
        return x[self.kept]

    def whole(self, x: Tensor) -> Tensor:
        """Those that are left (K,C) to all (P,C)."""
        parts = []
        for one in self.chosen:
            mine = x[one.where]
            parts.append(one.flat(mine if one.plan is None else one.plan.rebuild(mine)))
        order = torch.cat([one.flat(one.rows) for one in self.chosen]).argsort()
        return torch.cat(parts)[order]

    def complete(self, x: Tensor) -> tuple[Tensor, Packed]:
        return self.whole(x), self.base

    def every(self, x: Tensor, layer: int) -> Tensor | None:
        return self.whole(x) if layer < self.until else None

    # -- in a block
    def taken(self) -> Tensor | None:
        rows = self.base.taken()
        return self.kept if rows is None else rows[self.kept]

    def rows(self, table: Tensor) -> Tensor:
        return self.base.rows(table)[self.kept]

    def bounds(self, cu_seqlens: Tensor) -> Tensor:
        """A patch that is the first of its window counts to that window."""
        edges = self.base.bounds(cu_seqlens).to(self.kept)
        return torch.searchsorted(self.kept, edges).unique_consecutive().to(cu_seqlens.dtype)

    def bias(self) -> Tensor | None:
        bias = self.base.bias()
        return None if bias is None else bias[self.kept]

    def seen(self, cu_seqlens: Tensor) -> None:
        return None

    # -- for whoever reads tokens
    def expand(self, y: Tensor, each: int) -> Tensor:
        """(K,C) patches to all at the tower's entry; units are made of all patches, see
        :func:`~tokenreduce.adapters.encoders.packed_outputs.give_rebuilt`."""
        assert each == self.layout.unit
        return self.base.expand(self.whole(y), each)


class SetsAside:
    """What blocks of packed towers do with a method that rebuilds."""

    def _set_patches_aside(
        self, site: Site, reducer: Reducer, x: Tensor, packed: Packed
    ) -> tuple[Tensor | None, Tensor, Packed]:
        """What a method that rebuilds leaves of the patches; in front of it all, where attention is over them yet."""
        trace, every = active(), None
        with nullcontext() if trace is None else trace.clock():
            sparse = set_aside(reducer, x, packed, site.layer, site.depth)
            if sparse is not None:
                every, packed = x if site.layer < sparse.until else None, sparse
                x = sparse.take(x)
        if trace is not None:
            self._tell_all(trace, site, packed, reducer.spec())
        return every, x, packed

    def _tell_all(self, trace: Trace, site: Site, packed: Packed, method: str = "") -> None:
        """Note what leaves this block; of patches that are set aside how many of those that were seen together stay."""
        if not isinstance(packed, Sparse):
            for part in packed.parts:
                self._tell(trace, site, part, packed, None, method)
            return
        for one in packed.chosen:
            plan = one.plan.choice() if method and one.plan is not None else None
            step = Step("encoder", site.layer, one.where.shape[1], plan, method, patches=one.left, aside=True)
            trace.add(self, step)  # type: ignore[arg-type]

    def _tell(
        self, trace: Trace, site: Site, part: Part, packed: Packed, plan: Plan | None = None, method: str = ""
    ) -> None:
        step = Step("encoder", site.layer, part.where.shape[1], plan, method, patches=part.units * packed.layout.unit)
        trace.add(self, step)  # type: ignore[arg-type]


def rows_of(packed: Packed, per: str) -> list[tuple[Tensor, Tensor | None]]:
    """The patches that a method sees together, (G,U) places in the row, ascending, and which are there: of every view,
    views of a size as a batch, or ``per`` "all" of the row."""
    unit = packed.layout.unit
    if per == "all":
        total = sum(p.units for p in packed.parts) * unit
        return [(torch.arange(total, device=packed.parts[0].where.device)[None], None)]
    found: list[tuple[Tensor, Tensor | None]] = []
    for part in packed.parts:
        place = (part.where.unsqueeze(-1) * unit + torch.arange(unit, device=part.where.device)).flatten(1)
        if part.state.valid is None:
            found.append((place.sort(1).values, None))
            continue
        there = part.state.valid.repeat_interleave(unit, 1)
        order = place.masked_fill(~there, torch.iinfo(place.dtype).max).argsort(1)
        found.append((place.gather(1, order), there.gather(1, order)))
    return found


def set_aside(reducer: Reducer, x: Tensor, packed: Packed, layer: int, depth: int) -> Sparse | None:
    """What ``reducer`` sets aside of the patches ``x`` (P,C), None for nothing.

    Raises ``TypeError`` for a plan that is no :class:`~tokenreduce.core.plan.Rebuild`.
    """
    method: Any = reducer
    before = entered_of(x).reshape(x.shape)
    flat, groups = x, rows_of(packed, method.per)
    plans: list[Plan] = []
    for rows, there in groups:
        known: dict[str, Any] = {"valid": there, "layer": layer, "depth": depth}
        plans.append(reducer.plan(EncoderEvidence(flat[rows], before=before[rows], **known)))
    if all(plan.is_identity for plan in plans):
        return None
    stay = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for (rows, there), plan in zip(groups, plans, strict=True):
        if not plan.is_identity and not isinstance(plan, Rebuild):
            raise TypeError(f"{reducer.name} sets tokens aside, so its plan is a Rebuild, not a {type(plan).__name__}")
        real = torch.ones_like(rows, dtype=torch.bool) if there is None else there
        stay[rows[real]] = True if plan.is_identity else plan.places()[real]
    place = stay.cumsum(0) - 1
    chosen = tuple(
        Chosen(rows, there, plan if isinstance(plan, Rebuild) else None, place[plan.gather(rows)])
        for (rows, there), plan in zip(groups, plans, strict=True)
    )
    return Sparse(packed, chosen, stay.nonzero().flatten(), layer + method.as_layer)
