"""Shapes of a narrow model read as those of the true one, which has the same layers and wider ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

__all__ = ["Heads", "Scale"]


@dataclass(frozen=True)
class Heads:
    """Heads of queries, heads of keys, width of a head."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Scale:
    """``weights`` has (narrow, true) numbers of elements by the address of a narrow parameter, ``widths`` the true
    widths by narrow ones; ``heads`` are (narrow, true) by part."""

    weights: dict[int, tuple[int, int]]
    widths: dict[int, int]
    heads: dict[str, tuple[Heads, Heads]] = field(default_factory=dict)

    @classmethod
    def between(cls, narrow: nn.Module, true: nn.Module, heads: dict[str, tuple[Heads, Heads]]) -> Scale:
        """Raises ``ValueError`` where the two do not have the same parameters by name."""
        own = dict(narrow.named_parameters())
        other = dict(true.named_parameters())
        if own.keys() != other.keys():
            odd = sorted(own.keys() ^ other.keys())
            raise ValueError(f"the narrow model has other parameters than the true one: {', '.join(odd[:4])}")
        weights, widths = {}, {}
        for name, mine in own.items():
            theirs = other[name]
            weights[mine.untyped_storage().data_ptr()] = (mine.numel(), theirs.numel())
            for a, b in zip(mine.shape, theirs.shape, strict=True):
                if a != b:
                    widths[a] = b
        return cls(weights, widths, heads)

    def width(self, n: int) -> int:
        return self.widths.get(n, n)

    def elements(self, shape: Sequence[int], part: str) -> float:
        """Elements that a tensor of this narrow ``shape`` has in the true model."""
        out = 1.0
        for size in self.shape(shape, part):
            out *= size
        return out

    def shape(self, shape: Sequence[int], part: str) -> list[float]:
        """The true shape: the last dimension by its width, heads where a dimension in front is as long as those."""
        out = [float(n) for n in shape]
        if not out:
            return out
        narrow, true = self.heads.get(part, (None, None))
        if narrow is None or true is None:
            out[-1] = self.width(shape[-1])
            return out
        out[-1] = true.width if shape[-1] == narrow.width else self.width(shape[-1])
        if len(shape) >= 3:
            for i in range(len(shape) - 1):
                at_head = (len(shape) == 4 and i in (1, 2)) or shape[-1] == narrow.width
                if at_head and shape[i] == narrow.queries:
                    out[i] = true.queries
                    break
                if at_head and shape[i] == narrow.keys and narrow.keys > 1:
                    out[i] = true.keys
                    break
        return out
