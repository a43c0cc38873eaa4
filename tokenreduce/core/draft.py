"""Several methods with the shares that they keep, made milder or stronger together."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_method

__all__ = ["Draft", "LEAST"]

#: The least that any method keeps.
LEAST = 0.02


@dataclass(frozen=True)
class Draft:
    """Full names of methods, and the share that each keeps before the budget is known."""

    names: tuple[str, ...]
    splits: tuple[float, ...]

    def at(self, exponent: float) -> tuple[Reducer, ...]:
        """Every share to the power of ``exponent``: 0 keeps everything, and more keeps less."""
        keeps = (max(LEAST, round(split**exponent, 4)) for split in self.splits)
        return tuple(get_method(f"{name}:keep={keep}") for name, keep in zip(self.names, keeps, strict=True))
