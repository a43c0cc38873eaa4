"""What steps remember, each in a record of its own type."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Record", "State"]

R = TypeVar("R", bound="Record")


class Record:
    """What a step remembers of a generation or of one forward; a dataclass in the step's file, or in
    :mod:`tokenreduce.adapters.language.records` where several steps know it."""

    def reorder(self, rows: Tensor) -> None:
        """Follow beams of one prompt: row i is what row ``rows[i]`` was. What rows of a prompt share needs nothing."""

    def crop(self, left: int) -> None:
        """Forget all columns but the first ``left``."""


class State:
    """Records by their type and, where there is one for every layer, the layer."""

    def __init__(self) -> None:
        self._records: dict[tuple[type[Record], Any], Record] = {}

    def get(self, kind: type[R], layer: Any = None) -> R | None:
        return self._records.get((kind, layer))  # type: ignore[return-value]

    def of(self, kind: type[R], layer: Any = None) -> R:
        """The record, made empty at its first use."""
        key = (kind, layer)
        if key not in self._records:
            self._records[key] = kind()
        return self._records[key]  # type: ignore[return-value]

    def put(self, record: R, layer: Any = None) -> R:
        self._records[type(record), layer] = record
        return record

    def pop(self, kind: type[R], layer: Any = None) -> R | None:
        """The record, which is forgotten."""
        return self._records.pop((kind, layer), None)  # type: ignore[return-value]

    def layers(self, kind: type[R]) -> list[int]:
        """The layers that have a record of a kind, ascending."""
        return sorted(layer for known, layer in self._records if known is kind)

    def reorder(self, rows: Tensor) -> None:
        for record in self._records.values():
            record.reorder(rows)

    def crop(self, left: int) -> None:
        for record in self._records.values():
            record.crop(left)
