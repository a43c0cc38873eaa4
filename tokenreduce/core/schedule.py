"""When encoder methods act and how much they remove: in every layer by count, or in a few layers by equal ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tokenreduce.core.budget import (
    Keep,
    check_count,
    check_either,
    geometric,
    layer_schedule,
    linear,
    quarters,
    removed_in,
)
from tokenreduce.core.evidence import BaseEvidence
from tokenreduce.core.reducer import Reducer

__all__ = ["Scheduled", "check_layers", "stage_layers", "staged"]


@dataclass(frozen=True)
class Scheduled(Reducer):
    """Settings shared by methods that remove ``r`` tokens per layer.

    ``r`` is a number for every layer, ``(r, inflection)`` as in ToMe's code (or ``r`` with ``inflect``), or a list
    with one number per layer. ``keep`` instead of ``r`` names what is left of the patch tokens after the last layer,
    a count or a ratio, reached by equal steps.
    """

    r: int | Sequence[int] | tuple[int, float] = 0
    inflect: float = 0.0
    keep: int | float | None = None

    def __post_init__(self) -> None:
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
            object.__setattr__(self, "inflect", r[1])
            object.__setattr__(self, "r", r[0])
        self._removed(len(self.r) if isinstance(self.r, tuple) else 1)
        check_either(self.keep, self.r != 0)

    def acts_at(self, layer: int, depth: int) -> bool:
        return self.keep is not None or self._removed(depth)[layer] > 0

    def _removed(self, depth: int) -> tuple[int, ...]:
        return layer_schedule(cast("int | Sequence[int]", self.r), depth, self.inflect)

    def amount(self, evidence: BaseEvidence) -> int:
        """Tokens to remove at this layer."""
        if self.keep is not None:
            protected = evidence.n - evidence.free()
            left = linear(self.keep, evidence.entry - protected, evidence.layer, evidence.depth)
            return max(0, evidence.free() - left)
        if isinstance(self.r, int):
            if not self.inflect:  # nobody asks for the layer: a graph of one block then serves all
                return self.r
            return removed_in(self.r, evidence.layer, evidence.depth, self.inflect)
        return self._removed(max(evidence.depth, len(self.r)))[evidence.layer]


def check_layers(layers: tuple[int, ...] | None, name: str) -> None:
    """Raise ``ValueError`` unless ``layers`` is None or a tuple of different 0-based layers."""
    if layers is None:
        return
    if not isinstance(layers, tuple) or not layers:
        raise ValueError(f"{name} is a tuple of 0-based layers such as (3, 6, 9), or None, not {layers!r}")
    for layer in layers:
        check_count(layer, name)
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} names a layer twice: {layers!r}")


def stage_layers(layers: tuple[int, ...] | None, depth: int, name: str) -> tuple[int, ...]:
    """``layers`` ascending, or the quarters of ``depth``. Raises ``ValueError`` for a layer the model does not have."""
    if layers is None:
        return quarters(depth)
    if max(layers) >= depth:
        raise ValueError(f"{name}={layers!r}: the model has layers 0 to {depth - 1}; leave {name} out for its quarters")
    return tuple(sorted(layers))


def staged(keep: Keep, evidence: BaseEvidence, layers: tuple[int, ...]) -> int:
    """Reducible tokens left behind this layer, one of ``layers``, when equal ratios lead to ``keep`` at the last."""
    protected = evidence.n - evidence.free()
    return geometric(keep, evidence.entry - protected, layers.index(evidence.layer), len(layers))
