"""What a method kept of the gallery's pictures, and its form as text, which a person can compare line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenreduce.common.files import write_text

__all__ = ["Kept", "Without", "as_text", "read_kept", "region_from", "region_text", "write_kept"]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_GONE = "-"


@dataclass(frozen=True)
class Kept:
    """What a method left of ``pictures`` ("scenes" or "clip").

    Attributes:
        spec, model: the method with its settings, and the embedded model that it acted in.
        pictures: which pictures ``maps`` are of.
        maps: of every picture an array (rows, columns), the token that each patch went into, -1 where it is gone; the
            frames of the clip lie side by side in one. With ``heads`` (layers, rows, columns): how many of so many
            heads hold the key of a patch.
        heads: KV heads of a layer, 1 where all hold the same, 0 where ``maps`` are tokens.
        note: what else is to be known of this picture.
    """

    spec: str
    model: str
    pictures: str
    maps: tuple[np.ndarray, ...] = field(repr=False)
    heads: int = 0
    note: str = ""

    def left(self) -> list[tuple[float, int]]:
        """(tokens left, tokens) of every picture; with heads the mean over layers and heads."""
        if self.heads:
            return [(float(m.sum() / m.shape[0] / self.heads), m[0].size) for m in self.maps]
        return [(len(np.unique(m[m >= 0])), m.size) for m in self.maps]


@dataclass(frozen=True)
class Without:
    """Why a method has no picture."""

    why: str


def region_text(region: np.ndarray, wide: int = 2) -> str:
    """(rows, columns) numbers as text, ``wide`` characters each (the base is 36), a word for every row.

    >>> region_text(np.array([[0, -1], [37, 0]]))
    '00-- 1100'

    Raises ``ValueError`` for a number that so many characters do not hold.
    """
    most = len(_DIGITS) ** wide - 1
    if region.size and not -1 <= region.min() <= region.max() <= most:
        raise ValueError(f"numbers from -1 to {most} can be written, not {region.min()} to {region.max()}")
    return " ".join("".join(_cell(int(v), wide) for v in row) for row in region)


def _cell(value: int, wide: int) -> str:
    if value < 0:
        return _GONE * wide
    return "".join(_DIGITS[value // len(_DIGITS) ** i % len(_DIGITS)] for i in reversed(range(wide)))


def region_from(text: str, wide: int = 2) -> np.ndarray:
    """The reverse of :func:`region_text`. Raises ``ValueError`` for text that is none of its."""
    rows = [[row[i : i + wide] for i in range(0, len(row), wide)] for row in text.split()]
    if not rows or len({len(r) for r in rows}) != 1 or any(len(c) != wide for r in rows for c in r):
        raise ValueError(f"{text[:40]!r} is no map of tokens: rows of equal length, {wide} characters for each patch")
    return np.array([[-1 if c == _GONE * wide else int(c, len(_DIGITS)) for c in row] for row in rows])


def as_text(known: Mapping[str, Kept | Without]) -> str:
    """JSON, methods in the order of their names."""
    return json.dumps({name: _entry(known[name]) for name in sorted(known)}, indent=1) + "\n"


def _entry(one: Kept | Without) -> dict[str, Any]:
    if isinstance(one, Without):
        return {"without": one.why}
    about: dict[str, Any] = {"spec": one.spec, "model": one.model, "pictures": one.pictures}
    about |= {"note": one.note} if one.note else {}
    if one.heads:
        return {**about, "heads": one.heads, "maps": [[region_text(layer, 1) for layer in m] for m in one.maps]}
    return {**about, "maps": [region_text(_numbered(m)) for m in one.maps]}


def _numbered(region: np.ndarray) -> np.ndarray:
    """Tokens counted in the order in which they appear."""
    number: dict[int, int] = {}
    flat = [-1 if v < 0 else number.setdefault(int(v), len(number)) for v in region.flatten()]
    return np.array(flat).reshape(region.shape)


def write_kept(path: Path, known: Mapping[str, Kept | Without]) -> None:
    """Store what is known of methods by name. Raises ``OSError`` for a place that cannot be written."""
    write_text(path, as_text(known))


def read_kept(path: Path) -> dict[str, Kept | Without]:
    """What :func:`write_kept` stored. Raises ``OSError`` for a file that is not there, ``ValueError`` for another."""
    try:
        return {name: _read(entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what `python -m tokenreduce.bench.gallery` writes ({error}); make it again"
        ) from error


def _read(entry: Mapping[str, Any]) -> Kept | Without:
    if "without" in entry:
        return Without(entry["without"])
    heads = int(entry.get("heads", 0))
    maps: Sequence[Any] = entry["maps"]
    made = [np.stack([region_from(layer, 1) for layer in m]) for m in maps] if heads else list(map(region_from, maps))
    return Kept(entry["spec"], entry["model"], entry["pictures"], tuple(made), heads, entry.get("note", ""))
