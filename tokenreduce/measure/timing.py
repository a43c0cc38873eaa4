"""Clock times that can be compared: every candidate is timed in every round, so drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Timing", "fused_attention", "interleaved", "synchronise", "turns"]


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
        if len(self.times) != len(other.times):
            raise ValueError(
                f"{self.name} has {len(self.times)} rounds and {other.name} {len(other.times)}; "
                "compare timings of one interleaved() call"
            )
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


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
) -> dict[str, Timing]:
    """Time several functions round-robin: each round calls each of them once, every other round in reverse order.

    Whatever slows the machine for a while (other processes, heat, clocks) then slows all candidates, and ratios taken
    per round cancel it. ``warmup`` rounds are not counted. Calls run without gradients; CUDA is synchronised before
    and after each.

    Raises ``ValueError`` for no function, ``repeats`` below 1 or a negative ``warmup``.
    """
    if not functions:
        raise ValueError("functions is empty: give at least one callable to time")
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.no_grad():
        for round_, name in turns(functions, repeats, warmup):
            synchronise(device)
            began = time.perf_counter()
            functions[name]()
            synchronise(device)
            spent = time.perf_counter() - began
            if round_ >= 0:
                times[name].append(max(spent, 1e-9))  # a clock's resolution must not make a ratio infinite
    return {name: Timing(name, tuple(values)) for name, values in times.items()}
