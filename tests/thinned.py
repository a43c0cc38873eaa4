"""Crossed tables in the fast tests: every value of every axis once at least; `make test-slow` runs all products."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

#: What counts as one axis each: the parts of a test's id, which stacked ``parametrize`` and fixtures add.
Axes = tuple[str, ...]


def left_out(cases: Iterable[tuple[str, Axes]]) -> set[tuple[str, Axes]]:
    """Cases (test, its value on every axis) that a cover of all values of all axes does without.

    Taken in an order that looks random and is always the same, so that not all values meet the first of the others.
    """
    tables = defaultdict(list)
    for test, axes in cases:
        tables[test].append(axes)
    out = set()
    for test, rows in tables.items():
        seen: set[tuple[int, str]] = set()
        for axes in sorted(rows, key=lambda axes: zlib.crc32("-".join([test, *axes]).encode())):
            values = set(enumerate(axes))
            if values and values <= seen:
                out.add((test, axes))
            seen |= values
    return out
