"""The points of a sweep, and who watches them being measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Point", "Watch"]


@dataclass(frozen=True)
class Point:
    """One row to measure: a method (with fixed settings, if any) at a budget, or an explicit spec without one."""

    id: str
    method: str
    spec: str
    budget: float | None = None
    solved: bool = False

    @classmethod
    def at(cls, spec: str, budget: float) -> Point:
        return cls(f"{spec}@{budget:g}", spec, spec, budget, True)


class Watch:
    """What a sweep tells while it runs. The base class is silent."""

    def say(self, message: str) -> None:
        """Something the user should read once."""

    def plan(self, total: int, done: int) -> None:
        """``done`` of ``total`` points have a row already."""

    def begin(self, point: Point) -> None:
        """A point is about to be measured."""

    def end(self, point: Point, row: dict[str, Any]) -> None:
        """Its row is on the disk."""
