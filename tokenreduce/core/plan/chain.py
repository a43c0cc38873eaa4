"""Several plans, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.plan.base import Plan
from tokenreduce.core.plan.pool import Pool

__all__ = ["Chain"]


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Plan):
    """Several plans, one after the other; exact where a flat assignment would not be (norms, plain means, pools)."""

    plans: tuple[Plan, ...]

    def representatives(self) -> Tensor:
        out = self.plans[0].representatives()
        for plan in self.plans[1:]:
            out = out.gather(1, plan.representatives())
        return out

    def untouched(self) -> Tensor:
        out = self.plans[0].untouched()
        for plan in self.plans[1:]:
            out = plan.gather(out) & plan.untouched()
        return out

    def sources(self) -> Tensor:
        out = self.plans[0].sources()
        for plan in self.plans[1:]:
            out = torch.where(out < 0, -1, plan.sources().gather(1, out.clamp(min=0)))
        return out

    def validity(self) -> Tensor | None:
        out: Tensor | None = None
        for plan in self.plans:
            mine = plan.validity()
            if out is not None:
                out = plan.gather(out)
                out = out if mine is None else out & mine
            else:
                out = mine
        return out

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        for plan in self.plans:
            x, size = plan.reduce(x, size), plan.reduce_size(size)
        return x

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        for plan in self.plans:
            size = plan.reduce_size(size)
        return size

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        if all(not isinstance(p, Pool) for p in self.plans):
            return super().expand(y, fill)
        if isinstance(fill, Tensor):
            # What a token fed in part and was dropped later counts nothing; what fed nothing that is left is filled.
            there = self.expand(torch.ones_like(y[..., :1]))
            out = self.expand(y) / there.clamp(min=torch.finfo(y.dtype).tiny)
            return torch.where(there > 0, out, torch.as_tensor(fill, dtype=y.dtype, device=y.device))
        for plan in reversed(self.plans):
            y = plan.expand(y, fill)
        return y

    def to(self, device: torch.device | str) -> Plan:
        return Chain(self.n, tuple(p.to(device) for p in self.plans))

    def rows_at(self, rows: Tensor) -> Plan:
        return Chain(self.n, tuple(p.rows_at(rows) for p in self.plans))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.plans == other.plans

    __hash__ = None  # type: ignore[assignment]

    def summed(self) -> Plan:
        return Chain(self.n, tuple(p.summed() for p in self.plans))

    def averaged(self) -> Plan:
        return Chain(self.n, tuple(p.averaged() for p in self.plans))

    def _links(self) -> tuple[Plan, ...]:
        return self.plans

    def _described(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        parts = [p._described(f"{prefix}{i}.", tensors) for i, p in enumerate(self.plans)]
        return {"kind": "Chain", "n": self.n, "plans": parts}
