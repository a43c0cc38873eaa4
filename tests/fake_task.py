"""A task without a model: FLOPs are arithmetic on ``keep``, so that the sweep's own behaviour can be checked."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from tokenreduce.core.reducer import Reducer

BASE = 1000


class FakeTask:
    name = "fake"
    metric = "top1"
    stages: tuple[str, ...] = ("encoder",)

    def __init__(
        self, known: Sequence[str] = ("pitome", "random", "resize", "tome", "uniform"), **settings: Any
    ) -> None:
        self.known = list(known)
        self.given = {"model": "fake", "data": "none", **settings}
        self.problems: list[dict[str, str]] = []
        self.measured: list[str] = []
        self.prepared = 0
        self.evaluations = 0
        self.fail: tuple[str, ...] = ()
        self.kill_at: int | None = None
        self.interrupt_at: int | None = None

    def settings(self) -> dict[str, Any]:
        return dict(self.given)

    def prepare(self) -> None:
        self.prepared += 1

    def methods(self) -> list[str]:
        return list(self.known)

    def flops(self, reducers: Sequence[Reducer]) -> int:
        self.evaluations += 1
        return cost(reducers)

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        if self.kill_at == len(self.measured):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.interrupt_at == len(self.measured):
            raise KeyboardInterrupt
        names = "+".join(r.name for r in reducers)
        self.measured.append(names or "unreduced")
        if names and names in self.fail:
            raise RuntimeError(f"{names} went wrong\nsecond line")
        flops = self.flops(reducers)
        share = flops / BASE
        return {
            "tokens": [50, 40, int(50 * share)],
            "final_tokens": int(50 * share),
            "flops": flops,
            "gmacs": flops / 2e9,
            "top1": 0.9 * share**0.2 - 0.01 * len(names) * (share < 1),
            "top1_stderr": 0.01,
            "agreement": share,
            "speedup": 1 / share,
            "odd_number": 7,
            "notes": ["clamped"] if names == "pitome" else [],
        }


def cost(reducers: Sequence[Reducer]) -> int:
    """300 + 700 keep for most, steps of a tenth for resize; 40 per layer of ToMe's r."""
    out = float(BASE)
    for reducer in reducers:
        keep = getattr(reducer, "keep", None)
        if keep is None:
            out -= 40 * getattr(reducer, "r", 0)
        elif reducer.name == "resize":
            out *= 0.1 + 0.9 * round(keep, 1)
        else:
            out *= 0.3 + 0.7 * keep
    return round(out)
