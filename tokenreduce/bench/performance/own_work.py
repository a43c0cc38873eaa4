"""What part of a patched prefill is the reduction's own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tokenreduce as tr
from tokenreduce.core.reducer import Reducer
from tokenreduce.measure.timing import interleaved, synchronise

__all__ = ["own_seconds", "own_share", "timed"]


def own_share(model: Any, forward: Callable[[], object], device: str) -> float:
    """Share of ``forward()`` of the patched ``model`` that is the reduction's own work, the median of three."""
    (reducer,) = tr.describe(model).active
    tr.unpatch(model)
    return statistics.median(own / whole for own, whole in _runs(model, reducer, forward, device, 3))


def own_seconds(model: Any, reducer: Reducer, forward: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds that ``reducer`` works itself in ``forward()`` of the unpatched ``model`` once it is patched: the median
    of ``repeats``, behind one that is not counted. The model is left unpatched."""
    return statistics.median(own for own, _ in list(_runs(model, reducer, forward, device, repeats + 1))[1:])


def _runs(
    model: Any, reducer: Reducer, forward: Callable[[], object], device: str, repeats: int
) -> Iterator[tuple[float, float]]:
    """Seconds of own work and of all of ``forward()``, of every run."""
    watched = timed(reducer, device)
    with tr.patched(model, watched):
        for _ in range(repeats):
            watched.watch.seconds = 0.0
            with tr.record(model, flops=False, timing=True) as trace:
                whole = interleaved({"": forward}, 1, 0, device)[""].median
            yield max(watched.watch.seconds, trace.seconds), whole


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
