"""The rows of a run: a line of JSON each, on the disk as soon as it is known, so that a killed run leaves its rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce.common.files import append_line

__all__ = ["BROKEN", "Ledger", "last_rows", "missing"]

#: Exit code of a process whose CUDA context is lost: nothing more can be measured in it.
BROKEN = 3
Row = dict[str, Any]


def last_rows(path: Path) -> list[Row]:
    """The last line of every row in the file, in the order in which they came first; none where there is no file.

    A row has ``section``, ``key`` and ``status``: "ok", "error" (with ``error``), "skipped" (with ``why``), or "begun"
    where the process ended while it was measured. A line that a killed process left half-written is not a row.
    """
    found: dict[tuple[str, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["section"], row["key"]] = row
    return list(found.values())


def missing(path: Path, section: str, keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that have no end yet in the file."""
    ended = {row["key"] for row in last_rows(path) if row["section"] == section and row["status"] != "begun"}
    return [key for key in keys if key not in ended]


@dataclass
class Ledger:
    """Writes the rows of ``section`` to ``path`` until ``deadline`` (seconds of ``time.time()``).

    ``lost`` says after an error whether the device can still be used.
    """

    path: Path
    section: str
    deadline: float
    lost: Callable[[], bool] = lambda: False
    spent: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = {row["key"] for row in last_rows(self.path) if row["section"] == self.section}

    def left(self) -> float:
        """Seconds up to the deadline."""
        return self.deadline - time.time()

    def note(self, key: str, status: str, **facts: Any) -> None:
        """Write one line."""
        row = {"section": self.section, "key": key, "status": status, **facts}
        append_line(self.path, json.dumps(row, allow_nan=False, default=str))

    def skip(self, keys: Sequence[str], why: str) -> None:
        """Name rows that are not measured."""
        for key in keys:
            self.note(key, "skipped", why=why)

    def run(self, key: str, measure: Callable[[], Row], kind: str = "", needs: float = 3.0) -> None:
        """Measure one row, or say why not: it may take as long as the longest of its ``kind`` so far, at first
        ``needs`` seconds. A row that is in the file already is not measured again.

        Raises ``SystemExit`` with :data:`BROKEN` where the device is lost.
        """
        if key in self.seen:
            return
        needs = self.spent.get(kind, needs)
        if (left := self.left()) < needs:
            self.note(key, "skipped", why=f"{max(left, 0):.0f} s of the time were left, and it takes about {needs:.0f}")
            return
        self.note(key, "begun")
        began = time.monotonic()
        failed, facts = "", {}
        try:
            facts = measure()
        except Exception as error:
            failed = brief(error)
        took = time.monotonic() - began  # behind the handler, where nothing holds the tensors of a failed row
        if not failed:
            self.spent[kind] = max(self.spent.get(kind, 0.0), took)
            self.note(key, "ok", took=round(took, 2), **facts)
            return
        self.note(key, "error", error=failed, took=round(took, 2))
        if self.lost():
            raise SystemExit(BROKEN)


def brief(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
