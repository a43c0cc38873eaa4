"""The plan that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.plan.base import Plan

__all__ = ["Identity"]


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Plan):
    """Everything stays. Every operation returns its argument itself."""

    rows: int = 1
    device: torch.device = torch.device("cpu")  # type: ignore[assignment]  # noqa: RUF009 - immutable

    @classmethod
    def like(cls, x: Tensor) -> Identity:
        """The identity on tokens shaped like ``x`` (B,N,...)."""
        return cls(x.shape[1], x.shape[0], x.device)

    k = property(lambda self: self.n)  # type: ignore[assignment]
    batch = property(lambda self: self.rows)  # type: ignore[assignment]
    is_identity = property(lambda self: True)  # type: ignore[assignment]

    def representatives(self) -> Tensor:
        return torch.arange(self.n, device=self.device).expand(self.rows, -1)

    sources = representatives

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return x

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        return size

    def gather(self, meta: Tensor) -> Tensor:
        return meta

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        return y

    def to(self, device: torch.device | str) -> Plan:
        return Identity(self.n, self.rows, torch.device(device))

    def rows_at(self, rows: Tensor) -> Plan:
        return Identity(self.n, rows.shape[0], self.device)

    def _described(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        out = super()._described(prefix, tensors)
        out["settings"]["device"] = str(self.device)
        return out
