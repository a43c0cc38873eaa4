"""Budgets: how many tokens stay. Every method and every report turns a budget into a number here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = [
    "BudgetError", "check_count", "check_either", "check_keep", "check_share", "count", "describe_keep", "geometric",
    "layer_schedule", "linear", "proportional", "quarters", "removed_in",
]  # fmt: skip

Keep = int | float
_ROUNDED: dict[str, Callable[[float], int]] = {"up": lambda t: int(t + 0.5), "even": round, "down": int}


class BudgetError(ValueError):
    """A budget below what a method always keeps; a larger one fits. A search for a budget goes on from here."""


def check_keep(keep: Keep | None, name: str = "keep") -> None:
    """Raise ``ValueError`` unless ``keep`` is None, a count (int >= 1) or a ratio (float in (0, 1])."""
    if keep is None:
        return
    wrong = isinstance(keep, bool) or not isinstance(keep, int | float)
    if wrong or (isinstance(keep, int) and keep < 1) or (isinstance(keep, float) and not 0 < keep <= 1):
        raise ValueError(f"{name} is a number of tokens (int >= 1) or a ratio (float in (0, 1]), not {keep!r}")


def check_either(keep: Keep | None, other: bool, name: str = "r") -> None:
    """Raise ``ValueError`` for a bad ``keep``, and where it is given beside the ``other`` way to say how many tokens
    stay, whose setting is ``name``.

    >>> check_either(0.5, False), check_either(None, True)
    (None, None)
    """
    check_keep(keep)
    if keep is not None and other:
        raise ValueError(f"give {name} or keep, not both")


def check_count(value: int, name: str, least: int = 0) -> None:
    """Raise ``ValueError`` unless ``value`` is an int >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is an int >= {least}, not {value!r}")


def check_share(value: float, name: str, most: float = 1.0) -> None:
    """Raise ``ValueError`` unless ``value`` is a number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{name} is a number from 0 to {most:g}, not {value!r}")


def count(keep: Keep, n: int, rounding: str = "up") -> int:
    """Tokens that stay of ``n`` reducible ones: a count is capped at ``n``, a ratio is rounded half up; at least 1.

    ``rounding`` is for methods whose code rounds otherwise: "even" (half to even) or "down" (cut off).

    >>> count(64, 576), count(0.5, 9), count(0.001, 10), count(12, 10)
    (64, 5, 1, 10)
    >>> count(0.5, 9, "even"), count(0.5, 9, "down"), count(0.5, 11, "even")
    (4, 4, 6)
    """
    check_keep(keep)
    wanted = keep if isinstance(keep, int) else _ROUNDED[rounding](keep * n)
    return max(min(wanted, n), min(1, n))


def linear(keep: Keep, n: int, layer: int, depth: int) -> int:
    """Tokens that stay after ``layer`` (0-based) of ``depth`` when ``n`` shrink to ``keep`` by equal steps.

    >>> [linear(8, 20, i, 4) for i in range(4)]
    [17, 14, 11, 8]
    """
    return n - (n - count(keep, n)) * (layer + 1) // depth


def layer_schedule(r: int | Sequence[int], depth: int, inflect: float = 0.0) -> tuple[int, ...]:
    """Tokens removed per layer as in ToMe (arXiv 2210.09461): constant, growing (+1) or shrinking (-1), or a list.

    A list shorter than ``depth`` is padded with 0. Raises ``ValueError`` for negative numbers or a longer list.

    >>> layer_schedule(13, 12, -1.0)
    (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    """
    if isinstance(r, Sequence) and not isinstance(r, str):
        if len(r) > depth:
            raise ValueError(f"r lists {len(r)} layers but the model has {depth}")
        for value in r:
            check_count(value, "r")
        return tuple(r) + (0,) * (depth - len(r))
    if not isinstance(r, int):
        raise ValueError(f"r is an int >= 0 or a list with one for each layer, not {r!r}")
    check_count(r, "r")
    if not -1 <= inflect <= 1:
        raise ValueError(f"inflect is in [-1, 1], not {inflect!r}")
    return tuple(removed_in(r, i, depth, inflect) for i in range(depth))


def removed_in(r: int, layer: int, depth: int, inflect: float = 0.0) -> int:
    """One number of :func:`layer_schedule`, unchecked, for a number ``r``."""
    low = int(r * (1 - inflect))
    return int(low + layer * 2 * (r - low) / max(1, depth - 1))


def describe_keep(keep: Keep) -> str:
    """How reports print a budget: ``64 tokens`` or ``25 %``."""
    return f"{keep} tokens" if isinstance(keep, int) else f"{keep * 100:.4g} %"


def quarters(depth: int) -> tuple[int, ...]:
    """The layers where methods that act a few times do so: 3, 6, 9 of 12 and the same places in other depths.

    >>> quarters(12), quarters(6)
    ((3, 6, 9), (1, 3, 4))
    """
    return tuple(sorted({max(0, depth * i // 4) for i in (1, 2, 3)}))


def geometric(keep: Keep, n: int, step: int, steps: int) -> int:
    """Tokens that stay after ``step`` (0-based) of ``steps`` when ``n`` shrink to ``keep`` by equal ratios.

    >>> [geometric(0.125, 64, i, 3) for i in range(3)]
    [32, 16, 8]
    """
    last = count(keep, n)
    return last if step == steps - 1 else max(last, count((last / max(n, 1)) ** ((step + 1) / steps), n))


def proportional(total: int, sizes: Sequence[int]) -> list[int]:
    """``total``, at most their sum, shared out among groups of ``sizes`` in proportion: rounded down, then one more to
    the largest remainders, ties to the first.

    >>> proportional(5, [4, 4, 2]), proportional(2, [1, 1, 1]), proportional(0, [])
    ([2, 2, 1], [1, 1, 0], [])
    """
    whole = max(1, sum(sizes))
    out = [total * size // whole for size in sizes]
    first = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in first[: total - sum(out)]:
        out[i] += 1
    return out
