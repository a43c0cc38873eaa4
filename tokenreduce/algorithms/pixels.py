"""What methods share that drop parts of an image by its pixels, before a vision tower sees any of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer

__all__ = ["SLACK", "PixelReducer", "behind"]

#: Levels by which two pixels may differ more than ``tolerance``: normalising and undoing it is not exact in float32.
SLACK = 1e-3


@dataclass(frozen=True)
class PixelReducer(Reducer, position="input", needs=("pixels",)):
    """Base of methods at the input that look at pixels: ``evidence.x`` (B,N,P) are those of every unit, in 8-bit levels
    (0 to 255) less a constant of the channel. A unit is what a token is made of: a patch, or the patches that a merger
    or a pooling makes one token of. ``evidence.grid`` is that of the units, (rows, columns) or (frames, rows, columns).

    Args:
        tolerance: 8-bit levels by which pixels may differ and count as equal. With 0, the default, what goes are pixels
            that are there already, to the last bit: lossless in pixels (the model still attends to fewer tokens).
        metric: the distance of two units: "max" (their largest difference), "mae" (the mean of them), "rmse" (the root
            of the mean of squares).
        keep: instead of ``tolerance``, units that stay, a count or a ratio: those that differ most. An extension.
        std: the deviation by which the model's processor divides channels, a number or one for each; None takes it from
            the model. It turns normalised pixels into levels, and matters where ``tolerance`` is above 0.

    Raises ``ValueError`` for values other than these, and ``tolerance`` with ``keep``.
    """

    ragged: ClassVar[bool] = True
    gridded: ClassVar[bool] = True
    #: Whether a video whose frames run through a tower one by one is shown as one row, with its frames in the grid.
    temporal: ClassVar[bool] = False

    tolerance: float = 0.0
    metric: Literal["max", "mae", "rmse"] = "max"
    keep: int | float | None = None
    std: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.std, Sequence) and not isinstance(self.std, str):
            object.__setattr__(self, "std", tuple(self.std))
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is a number of 8-bit levels >= 0, not {self.tolerance!r}")
        if self.keep is not None and self.tolerance != 0:
            raise ValueError("give tolerance or keep, not both")
        if self.std is not None and not all(s > 0 for s in self.deviations()):
            raise ValueError(f"std is a number above 0, or one for each channel, not {self.std!r}")

    def deviations(self) -> tuple[float, ...]:
        """:attr:`std` as a tuple, empty where it is the model's."""
        if self.std is None:
            return ()
        return tuple(self.std) if isinstance(self.std, tuple) else (self.std,)

    @property
    def limit(self) -> float:
        """The distance up to which units count as equal."""
        return self.tolerance + SLACK if self.tolerance else 0.0

    # -- what a method says ------------------------------------------------------------------------------------------
    def gone(self, units: Tensor) -> Tensor:
        """(B,T,rows,cols) bool: which of ``units`` (B,T,rows,cols,P) go; of every frame one at least stays."""
        raise NotImplementedError("abstract")

    def scores(self, units: Tensor, keep: int) -> Tensor:
        """(B,T,rows,cols) float32: how much ``units`` (B,T,rows,cols,P) differ, where the ``keep`` highest stay."""
        raise NotImplementedError("abstract")

    # -- the plan ----------------------------------------------------------------------------------------------------
    def plan(self, evidence: EncoderEvidence) -> Plan:
        """Raises ``ValueError`` for units that are protected by a mask: they are no grid behind a prefix."""
        if evidence.masked:
            raise ValueError(f"{self.name} needs a grid of units behind a prefix: give protected as a count, no visual")
        p, free = evidence.prefix, evidence.free()
        frames, rows, cols = _layout(evidence.grid, free)
        k = free if self.keep is None else max(count(self.keep, free), min(frames, free))
        if free == 0 or (self.keep is not None and k == free):
            return Identity.like(evidence.x)
        units = evidence.x[:, p:].detach().unflatten(1, (frames, rows, cols))
        if self.keep is not None:
            scores = self.scores(units, k).flatten(1)
            return Prune(evidence.n, select(torch.nn.functional.pad(scores, (p, 0)), k, evidence))
        return stay_plan(~self.gone(units).flatten(1), evidence)


def stay_plan(stay: Tensor, evidence: EncoderEvidence) -> Plan:
    """The plan that keeps what is marked in ``stay`` (B,N-prefix), of what is there, behind the prefix."""
    p = evidence.prefix
    if evidence.valid is not None:
        stay = stay & evidence.valid[:, p:]
    there = stay.shape[1] if evidence.valid is None else evidence.valid[:, p:].sum()
    if bool((stay.sum(1) == there).all() if evidence.valid is None else (stay == evidence.valid[:, p:]).all()):
        return Identity.like(evidence.x)
    return behind(Prune.from_mask(stay), p)


def behind(plan: Prune, prefix: int) -> Prune:
    """``plan`` for tokens that stand behind ``prefix`` others, which stay."""
    if not prefix:
        return plan
    head = torch.zeros_like(plan.keep[:, :1]) + torch.arange(prefix, device=plan.device)  # of any batch when traced
    valid = None if plan.valid is None else torch.cat([torch.ones_like(head, dtype=torch.bool), plan.valid], 1)
    return Prune(plan.n + prefix, torch.cat([head, plan.keep + prefix], 1), valid)


def _layout(grid: tuple[int, ...] | None, units: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of ``units``; one row where they fill no grid."""
    if grid is not None and math.prod(grid) == units and len(grid) >= 2:
        return math.prod(grid[:-2]), grid[-2], grid[-1]
    return 1, 1, units
