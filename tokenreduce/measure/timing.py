"""Clock times that can be compared: every candidate is timed in every round, so drift hits all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Speedup", "Timing", "fused_attention", "interleaved", "synchronise", "times_text", "turns"]


def times_text(ratio: float, low: float, high: float) -> str:
    """A ratio of times for a table; ``≈`` stands before one whose interval includes 1, so that it may be noise.

    >>> times_text(1.5, 1.4, 1.6), times_text(1.02, 0.97, 1.1)
    ('1.50x', '≈1.02x')
    """
    return f"{'≈' if low <= 1 <= high else ''}{ratio:.2f}x"


@dataclass(frozen=True)
class Speedup:
    """How many times faster one function is than another, from rounds that belong together.

    Attributes:
        ratio: median over rounds of the times' ratio, which cancels what slowed the machine for a while.
        low, high: interval of that median: order statistics that cover it in at least 95 % of all cases; all rounds
            where there are fewer than six (3 rounds: 75 %, 5: 94 %). One round says nothing: 0 to infinity.
        rounds: how many.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Speedup:
        """From one ratio per round. Raises ``ValueError`` for none."""
        found = sorted(ratios)
        n = len(found)
        if not n:
            raise ValueError("there is no round to take a ratio of")
        if n == 1:
            return cls(found[0], 0.0, math.inf, 1)
        cut, tail = 0, 0.5**n
        while tail <= 0.025:  # the next value inwards still leaves at most 2.5 % on each side
            cut += 1
            tail += math.comb(n, cut) * 0.5**n
        cut = max(cut, 1)
        return cls(statistics.median(found), found[cut - 1], found[n - cut], n)

    @property
    def certain(self) -> bool:
        """Whether the interval lies on one side of 1; otherwise the difference is within noise."""
        return not self.low <= 1 <= self.high

    def after(self, seconds: float) -> float:
        """What the faster one takes where the other takes ``seconds``. Medians of both sides need not have the ratio
        of the rounds; a time that is shown beside a speed-up comes from here, so that the two never contradict."""
        return seconds / self.ratio

    @property
    def cell(self) -> str:
        """For a table: :func:`times_text`."""
        return times_text(self.ratio, self.low, self.high)

    @property
    def interval(self) -> str:
        """
        >>> Speedup(1.5, 1.4, 1.6, 3).interval
        '1.40 to 1.60'
        """
        return f"{self.low:.2f} to {self.high:.2f}" if self.rounds > 1 else "unknown, one round"

    def __str__(self) -> str:
        if not self.certain:
            return f"as fast, within noise ({self.cell}, interval {self.interval})"
        said = f"{self.ratio:.2f}x faster" if self.ratio > 1 else f"{1 / self.ratio:.2f}x slower"
        return f"{said} (speed-up {self.interval})"


@dataclass(frozen=True)
class Timing:
    """Seconds of one function, one number per round; round i of two timings from one call belongs together."""

    name: str
    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.times)

    def ratio(self, other: Timing) -> float:
        """Median over rounds of ``self / other``: 2.0 means that ``other`` is twice as fast.

        Raises ``ValueError`` when the two do not come from the same number of rounds.
        """
        return self.against(other).ratio

    def against(self, other: Timing) -> Speedup:
        """How much faster ``other`` is, with the interval of the rounds. Raises ``ValueError`` as :meth:`ratio`."""
        if len(self.times) != len(other.times):
            raise ValueError(
                f"{self.name} has {len(self.times)} rounds and {other.name} {len(other.times)}; "
                "compare timings of one interleaved() call"
            )
        return Speedup.of(a / b for a, b in zip(self.times, other.times, strict=True))


def synchronise(device: torch.device | str) -> None:
    """Wait until everything launched on ``device`` has run; nothing to do on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def fused_attention(device: torch.device | str) -> Iterator[None]:
    """Models run in their fastest stock form inside.

    ``nn.MultiheadAttention`` has an inference kernel of its own, which on a CPU is not fused and slower than the usual
    path; a reduced model must not get credit for leaving it. Other attention is fused already.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and torch.device(device).type != "cpu")
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def turns(names: Iterable[str], repeats: int, warmup: int = 0) -> Iterator[tuple[int, str]]:
    """``(round, name)`` round-robin, every other round in reverse order; rounds below 0 are warm-up.

    Raises ``ValueError`` for ``repeats`` below 1 or a negative ``warmup``.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is an int >= 1 and warmup an int >= 0, not {repeats!r} and {warmup!r}")
    order = list(names)
    for round_ in range(-warmup, repeats):
        for name in order if round_ % 2 == 0 else reversed(order):
            yield round_, name


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time several functions round-robin: each round calls each of them once, every other round in reverse order.

    Whatever slows the machine for a while (other processes, heat, clocks) then slows all candidates, and ratios taken
    per round cancel it. ``warmup`` rounds are not counted. Calls run without gradients; CUDA is synchronised before
    and after each. ``clock`` may be ``time.thread_time`` where torch has one thread and other processes disturb.

    Raises ``ValueError`` for no function, ``repeats`` below 1 or a negative ``warmup``.
    """
    if not functions:
        raise ValueError("functions is empty: give at least one callable to time")
    times: dict[str, list[float]] = {name: [] for name in functions}
    clock = clock or time.perf_counter
    with torch.no_grad():
        for round_, name in turns(functions, repeats, warmup):
            synchronise(device)
            began = clock()
            functions[name]()
            synchronise(device)
            spent = clock() - began
            if round_ >= 0:
                times[name].append(max(spent, 1e-9))  # a clock's resolution must not make a ratio infinite
    return {name: Timing(name, tuple(values)) for name, values in times.items()}
