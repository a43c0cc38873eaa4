"""What part of a patched prefill is the reduction's own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenreduce as tr
from tokenreduce.core.reducer import Reducer
from tokenreduce.measure.timing import interleaved, synchronise

__all__ = ["own_share", "timed"]


def own_share(model: Any, forward: Callable[[], object], device: str) -> float:
    """Share of ``forward()`` of the patched ``model`` that is the reduction's own work, the median of three."""
    (reducer,) = tr.describe(model).active
    watched = timed(reducer, device)
    shares = []
    tr.unpatch(model)
    with tr.patched(model, watched):
        for _ in range(3):
            watched.watch.seconds = 0.0
            with tr.record(model, flops=False, timing=True) as trace:
                whole = interleaved({"": forward}, 1, 0, device)[""].median
            shares.append(max(watched.watch.seconds, trace.seconds) / whole)
    return statistics.median(shares)


@dataclass
class _Watch:
    device: str
    seconds: float = 0.0
    depth: int = 0


def timed(reducer: Reducer, device: str) -> Any:
    """``reducer`` as one of a subclass that times its plans, and shares the watch with what adapters derive from it."""
    base: Any = type(reducer)

    class Timed(base):
        watch = _Watch(device)

        def plan(self, evidence: Any) -> Any:
            watch = self.watch
            if watch.depth:  # a plan that is made of plans
                return super().plan(evidence)
            synchronise(watch.device)
            began = time.perf_counter()
            watch.depth += 1
            try:
                plan = super().plan(evidence)
            finally:
                watch.depth -= 1
            synchronise(watch.device)
            watch.seconds += time.perf_counter() - began
            return plan

    Timed.name = base.name
    made = object.__new__(Timed)
    made.__dict__.update(vars(reducer))
    return made
