"""Three ways to count tokens, each a type of its own: tokens of an image, columns of a sequence, slots of a cache.

Nothing here turns one into another; :mod:`tokenreduce.adapters.language.columns` does, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["ColumnIndex", "SlotIndex", "TokenIndex"]

I = TypeVar("I", bound="_Index")  # noqa: E741


@dataclass(frozen=True, eq=False)
class _Index:
    """``at`` are numbers, (B,K), or (B,H,K) where KV heads differ; ``there``, of that shape, marks those that mean
    something (None: all do)."""

    at: Tensor
    there: Tensor | None = None

    @property
    def k(self) -> int:
        return self.at.shape[-1]

    def real(self) -> Tensor:
        """``there``, as bool in every case."""
        return torch.ones_like(self.at, dtype=torch.bool) if self.there is None else self.there

    def only(self: I, mask: Tensor | None) -> I:
        """Of those that are there, what ``mask`` (of the same shape) has, too; None has all."""
        if mask is None:
            return self
        return replace(self, there=mask if self.there is None else self.there & mask)

    def part(self: I, where: slice) -> I:
        """Some of the K numbers."""
        return replace(self, at=self.at[..., where], there=None if self.there is None else self.there[..., where])

    def rows(self: I, rows: Tensor) -> I:
        """Other samples of the batch."""
        return replace(self, at=self.at[rows], there=None if self.there is None else self.there[rows])

    def take(self: I, where: Tensor) -> I:
        """The numbers that stand at ``where``, of the shape of ``at`` but for K."""
        there = None if self.there is None else self.there.gather(-1, where)
        return replace(self, at=self.at.gather(-1, where), there=there)

    def then(self: I, *others: I) -> I:
        """These numbers, and ``others`` behind them."""
        parts = (self, *others)
        at = torch.cat([p.at for p in parts], -1)
        if all(p.there is None for p in parts):
            return replace(self, at=at, there=None)
        return replace(self, at=at, there=torch.cat([p.real() for p in parts], -1))


@dataclass(frozen=True, eq=False)
class TokenIndex(_Index):
    """Visual tokens of one image, by their number among those that a method sees of it; -1 is its class token, which
    stands in no column."""


@dataclass(frozen=True, eq=False)
class ColumnIndex(_Index):
    """Columns of the sequence as the caller sees it: those of the prompt, 0 to L-1, then one for every later token."""


@dataclass(frozen=True, eq=False)
class SlotIndex(_Index):
    """Places in a layer's cache, or in the sequence that enters a layer, where some columns are gone."""
