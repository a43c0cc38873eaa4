"""Stored results pages (``tokenreduce report --markdown``) read again: the rows of their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["StoredRow", "number", "stored_rows"]

_SECTION, _BUDGET = re.compile(r"^## (.+)$"), re.compile(r"^### (.+)$")
_METHOD = re.compile(r"^`([^`]+)`( \(baseline\))?$")
#: A column that tables of results have, and those of question types have not.
COUNTED = "GMACs"


@dataclass(frozen=True)
class StoredRow:
    """One row: the benchmark (``section``), what its ``budget`` was a share of, the method as text, and ``cells`` by
    the head of their column."""

    section: str
    budget: str
    spec: str
    baseline: bool
    cells: dict[str, str]


def stored_rows(text: str) -> Iterator[StoredRow]:
    """The rows of all tables of results in a page, in order; tables of question types are left out."""
    section = budget = ""
    heads: list[str] = []
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, budget, heads = found[1], "", []
        elif found := _BUDGET.match(line):
            budget, heads = found[1], []
        elif not line.startswith("|"):
            heads = []
        else:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not heads:
                heads = cells
            elif COUNTED in heads and (named := _METHOD.match(cells[0])):
                yield StoredRow(section, budget, named[1], bool(named[2]), dict(zip(heads, cells, strict=True)))


def number(cell: str) -> tuple[float, float]:
    """
    >>> number("99.4 ±0.4"), number("*75.1")
    ((99.4, 0.4), (75.1, 0.0))

    Raises ``ValueError`` for a cell without a number in front.
    """
    found = re.match(r"\*?([\d.,]+)(?: ±([\d.]+))?", cell)
    if found is None:
        raise ValueError(f"{cell!r} begins with no number")
    return float(found[1].replace(",", "")), float(found[2] or 0)
