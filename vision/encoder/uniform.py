"""Uniform pruning: every n-th token or a regular sub-grid, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.algorithms.baseline import spread
from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(Reducer, name="uniform", title="Uniform pruning"):
    """Uniform pruning: in one layer, keep tokens at equal distances.

    Of F tokens that may go, K stay: those at floor((i+1/2) F/K). Where the grid is known, K is rows times columns of a
    sub-grid, and its two strides differ by a factor of at most 2, the rows and columns of that sub-grid stay instead
    (the one with the most equal strides), so that both directions are thinned alike.

    Args:
        every: without ``keep``, one token of ``every`` stays.
        layer: 0-based layer that acts.
        keep: tokens that stay, a count or a ratio.

    Raises ``ValueError`` for bad values or a layer that the model does not have.
    """

    every: int = 2
    layer: int = 0
    gridded: ClassVar[bool] = True

    keep: int | float | None = None

    def __post_init__(self) -> None:
        check_count(self.every, "every", 1)
        check_count(self.layer, "layer")
        check_keep(self.keep)
        if self.keep is not None and self.every != 2:
            raise ValueError("give every or keep, not both")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free = evidence.free()
        k = count(1 / self.every if self.keep is None else self.keep, free)
        if k >= free or evidence.layer != self.layer:
            return Identity.like(evidence.x)
        return Prune(evidence.n, select(spread(evidence, k, evidence.grid), k, evidence))
