"""What methods of the cache stage left: keys for each head, and bytes at the peak of the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.core.trace import CacheStep

__all__ = ["Thinned", "cache_peak", "thinned"]


@dataclass(frozen=True)
class Thinned:
    """Keys of a KV head, mean over samples, heads and the layers where ``method`` acted: ``before`` and ``kept`` at the
    prompt, and ``last`` behind its last choice in decode (None where it made none)."""

    method: str
    layers: int
    before: float
    kept: float
    last: float | None


def thinned(steps: Sequence[CacheStep]) -> tuple[Thinned, ...]:
    """One for each method in ``steps`` of a trace."""
    out = []
    for method in dict.fromkeys(s.method for s in steps):
        mine = [s for s in steps if s.method == method]
        prompt = [s for s in mine if s.step == 0]
        later = {s.layer: s for s in mine if s.step}
        first = prompt or [next(s for s in mine if s.layer == layer) for layer in later]
        out.append(
            Thinned(
                method, len(first), _mean([s.before for s in first]),
                _mean([s.kept if prompt else s.before for s in first]),
                _mean([s.kept for s in later.values()]) if later else None,
            )
        )  # fmt: skip
    return tuple(out)


def _mean(counts: Sequence[object]) -> float:
    values = [float(c.float().mean()) for c in counts]  # type: ignore[attr-defined]
    return sum(values) / len(values)


def cache_peak(layers: Sequence[int], steps: Sequence[CacheStep]) -> int:
    """Largest number of bytes that the cache held in a prefill which left ``layers`` bytes in each layer.

    A layer that is thinned right behind its own prefill is whole only while those behind it hold nothing yet.
    """
    full = list(layers)
    together = False
    for step in steps:
        if step.step == 0:
            full[step.layer] = step.bytes_before
            together = together or step.together
    if together:
        return sum(full)
    return max((sum(layers[:i]) + full[i] for i in range(len(layers))), default=0)
