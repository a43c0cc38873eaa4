"""What is known of methods: how well they did on the embedded models, from the table ``known.json``.

The table is made by ``python -m tokenreduce.tuning.known`` from the stored results pages and from what
``tokenreduce tune`` found, and says so itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenreduce.core.draft import Draft

__all__ = ["FILE", "Candidate", "Group", "Point", "groups"]

FILE = Path(__file__).with_name("known.json")


class Point(NamedTuple):
    """The score where every method kept its share ``keep``, with its standard error."""

    keep: tuple[float, ...]
    score: float
    stderr: float


@dataclass(frozen=True)
class Candidate:
    """Methods by full name, measured at ``points``, from mild to strong, whose shares are powers of each other."""

    methods: tuple[str, ...]
    points: tuple[Point, ...]
    source: str

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.rpartition("@")[2] for name in self.methods))

    @property
    def draft(self) -> Draft:
        """The strongest setting that was measured, at exponent 1."""
        return Draft(self.methods, self.points[-1].keep)

    def score(self, exponent: float, unreduced: float) -> tuple[float, Point]:
        """The score at ``exponent`` of :attr:`draft`, in (0, 1], drawn along lines between the points and the unreduced
        model, and the point that was measured next to it."""
        strongest = math.log(self.points[-1].keep[0])
        at = [math.log(p.keep[0]) / strongest for p in self.points]
        ends = [(0.0, unreduced), *zip(at, (p.score for p in self.points), strict=True)]
        near = min(self.points, key=lambda p: abs(math.log(p.keep[0]) / strongest - exponent))
        for (a, low), (b, high) in itertools.pairwise(ends):
            if exponent <= b:
                return low + (high - low) * (exponent - a) / (b - a), near
        return ends[-1][1], near


@dataclass(frozen=True)
class Group:
    """Candidates that were measured alike: ``what`` the score is, and that of the unreduced model."""

    what: str
    unreduced: float
    candidates: tuple[Candidate, ...]


@functools.cache
def groups() -> dict[str, Group]:
    """``image`` for encoders, ``language`` for what is before and inside a language model, ``cache``."""
    raw: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["groups"]
    return {
        name: Group(
            given["what"], given["unreduced"],
            tuple(
                Candidate(
                    tuple(one["methods"]),
                    tuple(Point(tuple(p["keep"]), p["score"], p["stderr"]) for p in one["points"]),
                    one["source"],
                )
                for one in given["candidates"]
            ),
        )
        for name, given in raw.items()
    }  # fmt: skip
