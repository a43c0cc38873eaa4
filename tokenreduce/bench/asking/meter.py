"""What reductions cost: visual tokens, FLOPs, cache and time of a prefill, on a few questions each run alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from tokenreduce.bench.asking.runner import Runner, quiet
from tokenreduce.bench.asking.shared import Shared
from tokenreduce.bench.questions import Item
from tokenreduce.bench.times import floor, speed_keys
from tokenreduce.bench.tower_clock import tower_clock
from tokenreduce.common.words import whole
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Trace, record
from tokenreduce.measure.generation import cache_bytes, layers_of, patches_left, patches_of, visual_columns
from tokenreduce.measure.timing import Speedup, fused_attention, interleaved
from tokenreduce.patching import describe, patched

__all__ = ["Clock", "Cost", "Meter", "clock", "tower_too"]

#: Of the probes, how many are looked at where a method keeps the same number for each.
FEW = 2
#: ``(meter, reduced, rounds)`` to the times of a row, of a model that is patched already where ``reduced``.
Clock = Callable[["Meter", bool, int], dict[str, float | None]]


class Cost(NamedTuple):
    """Means over the probes; ``layers`` are visual tokens in each layer of the language model."""

    encoder: float | None
    layers: list[float]
    flops: int
    cache: float
    notes: list[str]


class Meter:
    """Counts on the probes: ``items``, which the unreduced model of ``runner`` answered."""

    def __init__(self, runner: Runner, items: Sequence[Item]) -> None:
        self.runner = runner
        self.probes = [runner.probe(item) for item in items]
        #: The same for a search, where methods that look at the same of the tower may share what it made.
        self._searched = [q if q.remake is None else replace(q, remake=Shared(q.remake)) for q in self.probes]
        self.visual = [visual_columns(runner.loaded.model, question) for question in self.probes]
        self.depth = len(describe(runner.stock).language.layers)
        self._costs: dict[tuple[Reducer, ...], Cost] = {}
        self._dense: list[int] = []  # FLOPs of the unreduced model by probe, once counted

    def spent(self, reducers: Sequence[Reducer], flops: bool = False) -> float:
        """Visual tokens per question, averaged over the layers of the language model; or FLOPs per question."""
        model, totals = self.runner.loaded.model, [int(v.sum()) for v in self.visual]
        if not reducers:
            return self.cost(()).flops if flops else sum(totals) / len(totals)
        seen: list[tuple[int, ...]] = []
        spent: list[int] = []
        few = FEW if len(set(totals)) == 1 else len(totals)
        # What is shared was made without being counted.
        asked = self.probes if flops else self._searched
        with patched(model, *reducers), quiet():
            for question, visual in zip(asked, self.visual, strict=True):
                with record(model, flops=flops) as trace:
                    self.runner.prefill(model, question)
                seen.append(layers_of(trace.steps, visual, self.depth)[1])
                spent.append(trace.flops if flops else 0)
                if len(seen) == few and len(set(seen)) == 1 and not _ragged(trace):
                    break
        if flops:  # questions differ in length: how much fewer those take that were asked
            return self.cost(()).flops * sum(spent) / sum(self._dense[: len(spent)])
        return sum(map(sum, seen)) / len(seen) / self.depth

    def cost(self, reducers: tuple[Reducer, ...]) -> Cost:
        """What a prefill costs; counted once for each ``reducers``. The model is as before afterwards."""
        if reducers not in self._costs:
            with patched(self.runner.loaded.model, *reducers) if reducers else nullcontext():
                self._costs[reducers] = self.count(() if reducers else self._dense)
        return self._costs[reducers]

    def count(self, each: list[int] | tuple[()] = ()) -> Cost:
        """What a prefill of the model costs as it is now, patched or not; FLOPs of every probe go into ``each``."""
        model = self.runner.loaded.model
        encoders: list[int | None] = []
        layers: list[tuple[int, ...]] = []
        flops, cache = [], []
        notes: list[str] = []
        for question, visual in zip(self.probes, self.visual, strict=True):
            with record(model) as trace:
                made = self.runner.prefill(model, question)
            flops.append(trace.flops)
            cache.append(cache_bytes(made))
            layers.append(layers_of(trace.steps, visual, self.depth)[1])
            encoders.append(patches_left(model, question, patches_of(model, question), trace.steps))
            notes += trace.notes
        if isinstance(each, list):
            each[:] = flops
        n = len(layers)
        if (
            len({tuple(row[i] / row[0] for i in range(self.depth)) for row in layers if row[0]}) > 1
            or len({row[0] / int(v.sum()) for row, v in zip(layers, self.visual, strict=True)}) > 1
        ):
            notes.append(
                f"what is kept depends on the question: tokens, FLOPs and cache are means over {n} questions, each run "
                "alone; in a batch all are padded to the longest"
            )
        known = [e for e in encoders if e is not None]
        return Cost(
            whole(sum(known) / n) if len(known) == n else None,
            [whole(sum(column) / n) for column in zip(*layers, strict=True)],
            round(sum(flops) / n),
            whole(sum(cache) / n),
            list(dict.fromkeys(notes)),
        )


def clock(meter: Meter, reduced: bool, rounds: int) -> dict[str, float | None]:
    """Time to the first token against the stock model, and the reduction's share of it."""
    runner, question = meter.runner, meter.probes[0]
    stock, model, device = runner.stock, runner.loaded.model, runner.loaded.device
    with quiet(), fused_attention(device):
        times = interleaved(
            {"stock": lambda: runner.prefill(stock, question), "this": lambda: runner.prefill(model, question)},
            rounds, device=device,
        )  # fmt: skip
        share: float | None = 0.0
        if reduced and device.type == "cpu":
            own = total = 0.0
            for _ in range(min(3, rounds)):
                began = time.perf_counter()
                with record(model, flops=False, timing=True) as trace:
                    runner.prefill(model, question)
                total += time.perf_counter() - began
                own += trace.seconds
            share = own / total
        elif reduced:
            share = None  # kernels run behind the CPU's clock
    faster = times["stock"].against(times["this"])
    return {
        "first_token_s": times["this"].median,
        **speed_keys(faster if reduced else floor(faster)),
        "reduction_share": share,
    }


def tower_too(meter: Meter, reduced: bool, rounds: int) -> dict[str, float | None]:
    """As :func:`clock`, with ``tower_s`` of the vision tower with its projector, and ``tower_speedup``."""
    device = meter.runner.loaded.device

    def inner(model: Any) -> Any:
        return describe(model).language.inner

    runner = meter.runner
    with tower_clock(inner(runner.stock), device) as stock, tower_clock(inner(runner.loaded.model), device) as mine:
        out = clock(meter, reduced, rounds)
    # One call in every round, behind that of the warm-up; the later ones are of another measurement.
    a, b = (seconds[1 : 1 + rounds] for seconds in (stock, mine))
    if len(a) != rounds or len(b) != rounds:
        return out
    speedup = Speedup.of(x / y for x, y in zip(a, b, strict=True))
    faster = speedup if reduced else floor(speedup)
    return {**out, "tower_s": statistics.median(b), **speed_keys(faster, "tower_speedup")}


def _ragged(trace: Trace) -> bool:
    return any(plan.validity() is not None for plan in trace.plans)
