"""What a reader of images finds in a data set: items of a source with their labels, by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

__all__ = ["SPLITS", "Classes", "Problem", "Read", "Source", "find_split"]

#: Other names under which the split that was asked for may lie.
SPLITS = {
    "test": ("test", "val", "validation", "valid"),
    "val": ("val", "validation", "valid", "test"),
    "train": ("train", "training"),
}
Classes = tuple[str, ...] | None


@dataclass(frozen=True)
class Problem:
    """An input that could not be used."""

    path: str
    reason: str


class Source:
    """``open(item)`` gives a PIL image (decoded or not) and may raise anything; ``where(item)`` names the item."""

    def open(self, item: Any) -> Image.Image:
        raise NotImplementedError("abstract")

    def where(self, item: Any) -> str:
        raise NotImplementedError("abstract")


@dataclass
class Read:
    """What a reader found: items of a source with their labels, and what it could not use or had to assume.

    A label is a number, or several numbers (as many for every item, -1 for none).
    """

    source: Source
    items: list[Any]
    labels: list[Any]
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_split(split: str, present: Sequence[str], where: str) -> tuple[str, list[str]]:
    """The name under which a split is there, and a note where it is another one."""
    found = next((s for s in SPLITS.get(split, (split,)) if s in present), None)
    if found is None:
        raise ValueError(f"{where} has no split {split!r}; it has: {', '.join(present)}. Fix: --split {present[0]}")
    return found, [] if found == split else [f"there is no split {split}; {found} is used"]
