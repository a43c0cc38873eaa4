"""Break-even: from which size on a reduction is faster by the clock. Fewer FLOPs are not always less time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["BreakEven", "break_even"]

Input = TypeVar("Input")


@dataclass(frozen=True)
class BreakEven:
    """``size`` is the smallest tested size from which on every tested size was faster; None if the largest was not.

    ``speedups`` has the measured median speed-up of every size; above 1 the reduced model is faster. ``measured`` has
    the same with their intervals: a size whose interval includes 1 is not faster, but as fast within noise.
    """

    size: int | None
    speedups: dict[int, float]
    measured: dict[int, Speedup] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        measured = ", ".join(
            f"{size}: {self.measured[size].cell if size in self.measured else f'{value:.2f}x'}"
            for size, value in self.speedups.items()
        )
        return f"{'never faster' if self.size is None else f'faster from {self.size} on'} ({measured})"


def break_even(
    stock: Callable[[Input], object],
    reduced: Callable[[Input], object],
    inputs: Callable[[int], Input],
    sizes: Iterable[int] = (1, 2, 4, 8, 16, 32),
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> BreakEven:
    """Measure ``stock`` against ``reduced`` over growing sizes.

    ``inputs(size)`` makes the input of one size, whatever that means: a batch of that many images
    (``lambda n: torch.randn(n, 3, 224, 224)``) or a number of tokens. All sizes are measured, also behind the first
    faster one: a single lucky size is no break-even. Raises ``ValueError`` for no size or a size below 1.
    """
    tested = sorted(set(sizes))
    if not tested or tested[0] < 1:
        raise ValueError(f"sizes lists ints >= 1, not {tested!r}")
    measured: dict[int, Speedup] = {}
    for size in tested:
        x = inputs(size)
        calls = {"stock": lambda x=x: stock(x), "reduced": lambda x=x: reduced(x)}
        timings = interleaved(calls, repeats, warmup, device)
        measured[size] = timings["stock"].against(timings["reduced"])
    first = None
    for size in reversed(tested):
        found = measured[size]
        if found.ratio <= 1 or not (found.certain or found.rounds == 1):
            break
        first = size
    return BreakEven(first, {size: found.ratio for size, found in measured.items()}, measured)
