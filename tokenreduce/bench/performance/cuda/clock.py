"""The clock on a CUDA device, and CUDA graphs.

A kernel runs behind the back of the process that started it, so the device is waited for before and after what is
timed. Waiting costs some microseconds, and a replayed graph of a small model takes hundreds: functions are called
several times between two looks at the clock.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from tokenreduce.measure.operators import count_operators
from tokenreduce.measure.timing import Speedup, Timing, interleaved, synchronise

__all__ = ["Rehearsal", "attention_kernels", "captured", "lost", "syncs", "timed", "told"]

#: Seconds between two looks at the clock, at least.
LONG = 0.01


def timed(functions: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Timing]:
    """Seconds of one call of each function, in the same rounds, for about ``seconds`` in all (3 to 25 rounds); one call
    of each where these are 0."""
    if not seconds:
        return interleaved(functions, 1, 0, device)
    each = {}
    for name, function in functions.items():
        function()
        function()
        synchronise(device)
        began = time.perf_counter()
        function()
        synchronise(device)
        each[name] = max(time.perf_counter() - began, 1e-6)
    times = {name: min(math.ceil(LONG / one), 200) for name, one in each.items()}
    rounds = min(max(int(seconds / sum(times[n] * each[n] for n in each)), 3), 25)
    got = interleaved({n: _again(functions[n], times[n]) for n in functions}, rounds, 1, device)
    return {n: Timing(n, tuple(t / times[n] for t in got[n].times)) for n in functions}


def _again(function: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function()

    return run


def told(speedup: Speedup) -> list[float]:
    """A speed-up with its interval and rounds, for a file; an interval without an end ends at a million."""
    return [*(round(min(n, 1e6), 4) for n in (speedup.ratio, speedup.low, speedup.high)), speedup.rounds]


class Rehearsal:
    """Stands for ``torch.cuda`` in a dry run: what would be captured runs, and a replay does nothing."""

    class CUDAGraph:
        def replay(self) -> None:
            pass

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    def current_stream(self) -> Any:
        return self.Stream()

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def graph(self, graph: Any) -> Any:
        return nullcontext()


def captured(function: Callable[[], object], cuda: Any = torch.cuda) -> Callable[[], None]:
    """``function`` as a CUDA graph: what is called only starts the kernels that it ran, on the same memory.

    Raises ``RuntimeError`` where ``function`` waits for the device or asks it for numbers.
    """
    aside = cuda.Stream()
    aside.wait_stream(cuda.current_stream())
    with cuda.stream(aside):  # constants are made and libraries loaded before anything is captured
        for _ in range(3):
            function()
    cuda.current_stream().wait_stream(aside)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        out = function()

    def replay(kept: object = out) -> None:
        graph.replay()

    return replay


def syncs(function: Callable[[], object], device: str) -> int | None:
    """How often ``function`` makes the host wait for the device; None on a CPU, where nothing waits."""
    if torch.device(device).type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(w.message) for w in said)


def attention_kernels(model: Any, function: Callable[[], object]) -> str:
    """Which kernels of fused attention a forward runs, the most frequent first: "12 flash"."""
    with torch.inference_mode(False):  # where composite operators are not taken apart
        around = count_operators(model, function, []).around
    found = {
        name.partition("_scaled_dot_product_")[2].replace("_attention", "").removeprefix("fused_"): n
        for name, n in around.most_common()
        if "_scaled_dot_product_" in name
    }
    return ", ".join(f"{n} {name}" for name, n in found.items())


def lost(device: str) -> bool:
    """Whether nothing can be computed on ``device`` any more, as after an illegal access to memory."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except Exception:
        return True
    torch.cuda.empty_cache()
    return False
