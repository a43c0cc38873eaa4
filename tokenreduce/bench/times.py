"""Times of rows that agree with each other: every row is timed against the stock model in rounds of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenreduce.measure.timing import Speedup

__all__ = ["consistent", "floor", "speed_keys", "within_noise"]

#: Times of a row by the speed-up that they go with; what is a rate is turned over.
TIMES = {"speedup": ("first_token_s", "seconds_per_image", "images_per_s"), "tower_speedup": ("tower_s",)}
RATES = ("images_per_s",)


def floor(measured: Speedup) -> Speedup:
    """The unreduced model against itself: 1.0, with the interval that was measured as the floor of noise."""
    return Speedup(1.0, min(measured.low, 1.0), max(measured.high, 1.0), measured.rounds)


def speed_keys(speedup: Speedup, name: str = "speedup") -> dict[str, float]:
    """A speed-up with its interval as keys of a row."""
    return {name: speedup.ratio, f"{name}_low": speedup.low, f"{name}_high": speedup.high}


def consistent(row: Mapping[str, Any], unreduced: Mapping[str, Any] | None) -> dict[str, Any]:
    """``row`` with times that are those of the ``unreduced`` row over its speed-ups, and with that row's floor of noise
    beside each of them (``speedup_noise_low``, ``speedup_noise_high``).

    The medians of two rows come from different rounds, minutes apart, and may say the opposite of the ratio that both
    were timed for. Without an unreduced row, or without times, nothing changes.
    """
    out = dict(row)
    for name, keys in TIMES.items():
        ratio = row.get(name)
        if ratio is not None and unreduced is not None and unreduced.get(name) is not None:
            out.update({f"{name}_noise_{end}": unreduced.get(f"{name}_{end}") for end in ("low", "high")})
        for key in keys:
            base = None if unreduced is None else unreduced.get(key)
            if ratio and base is not None and row.get(key) is not None:
                out[key] = base * ratio if key in RATES else base / ratio
    return out


def within_noise(row: Mapping[str, Any], name: str = "speedup") -> bool:
    """Whether a row's speed-up may be noise: its interval includes 1, or it lies inside that of the unreduced model
    against itself. False where the row has no interval.

    An infinite end is stored as None.
    """
    ratio, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if ratio is None or low is None:
        return False
    least, most = (row.get(f"{name}_noise_{end}") for end in ("low", "high"))
    if least is not None and least <= ratio and (most is None or ratio <= most):
        return True
    return bool(low <= 1 and (high is None or high >= 1))
