"""Simple and hard samples: those that a smaller input answers at the same cost, and those that it does not.

Where most samples survive a plain resize, the mean over all hides what methods differ in; benchmarks of this field
therefore rank on the others. Every row keeps which of its samples were right (:func:`marks`), and :func:`grouped` says
how each row does on both groups of its budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tokenreduce.bench.methods import TOLERANCE
from tokenreduce.bench.task import FLOPS, Axis

__all__ = ["MARKS", "grouped", "marks", "misses"]

#: The key of a row that holds its marks.
MARKS = "right"
#: The baseline that makes the groups, by its name without the stage.
MAKER = "resize"
_RIGHT, _WRONG, _UNUSED = "1", "0", "-"


def marks(ids: Iterable[int], right: Mapping[int, bool]) -> str:
    """A character per sample of ``ids`` in order: 1 right, 0 wrong, - not used.

    >>> marks(range(4), {0: True, 3: False})
    '1--0'
    """
    return "".join(_UNUSED if i not in right else _RIGHT if right[i] else _WRONG for i in ids)


def misses(row: dict[str, Any], axis: Axis = FLOPS) -> bool:
    """Whether a row costs something else than its budget, so that it cannot be compared with the others there."""
    budget, share = row.get("budget"), row.get(axis.key)
    return budget is not None and share is not None and abs(share - budget) > TOLERANCE


def grouped(rows: Iterable[dict[str, Any]], axis: Axis = FLOPS) -> list[dict[str, Any]]:
    """``rows`` with ``simple`` and ``hard``, the shares of right answers among the samples of their budget that the
    resize baseline answers and that it does not, each with its standard error, and the number of hard ones,
    ``hard_samples``.

    A row without marks, or at whose budget no such baseline was measured at that cost (``axis``), has neither; a group
    without samples is None.
    """
    rows = list(rows)
    made: dict[Any, str] = {}
    for row in rows:
        maker = row.get("method", "").partition("@")[0] == MAKER and not row.get("error") and row.get(MARKS)
        if maker and not misses(row, axis):
            made[row.get("budget")] = row[MARKS]
    return [_with_groups(row, made.get(row.get("budget"))) for row in rows]


def _with_groups(row: dict[str, Any], simple: str | None) -> dict[str, Any]:
    mine = row.get(MARKS)
    own = row.get("method", "").partition("@")[0] == MAKER
    if simple is None or own or row.get("error") or not mine or len(mine) != len(simple):
        return row
    out = dict(row)
    for name, mark in (("simple", _RIGHT), ("hard", _WRONG)):
        of = [a for a, b in zip(mine, simple, strict=True) if b == mark and a != _UNUSED]
        share = of.count(_RIGHT) / len(of) if of else None
        out[name] = share
        out[f"{name}_stderr"] = None if share is None else math.sqrt(share * (1 - share) / len(of))
        if name == "hard":
            out["hard_samples"] = len(of)
    return out
