"""What the benchmark scripts share: one model, unreduced and with each reduction that is named, as a table and rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tokenreduce.bench.times import consistent
from tokenreduce.common.files import append_line, write_text
from tokenreduce.common.words import counted
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer

__all__ = ["run_script"]


def run_script(
    task: Any,
    chosen: Sequence[tuple[Reducer, ...]],
    title: str,
    table: Callable[[list[dict[str, Any]], int], Any],
    out: Path | None,
    what: str,
) -> None:
    """Measure ``task`` unreduced and with each of ``chosen``, print ``table(rows, width)``, notes and what could not be
    used (``what``: image, question). Every row goes to ``out`` as a JSON line when it is there.

    Exit status 1 when a row failed; what the unreduced model raises is raised.
    """
    from tokenreduce.common.screen import complain, console

    if out is not None:
        write_text(out, "", "choose another place with --out")
    screen = console()
    screen.say(title)
    with screen.status("loading, and evaluating the unreduced model"):
        task.prepare()
    rows: list[dict[str, Any]] = []
    failed = 0
    for reducers in [(), *chosen]:
        name = label_of(reducers) or "unreduced"
        with screen.status(name):
            try:
                row = task.measure(reducers)
            except Exception as error:  # the rows that were measured already are worth keeping
                if not reducers:
                    raise
                failed += 1
                complain(f"{name} failed: {type(error).__name__}: {error}")
                continue
        row = consistent(row, rows[0]) if rows else row
        row = {"method": name, **row, "share": row["flops"] / task.flops(())}
        rows.append(row)
        if out is not None:
            append_line(out, json.dumps({**task.settings(), **row}), "choose another place with --out")
    screen.print(table(rows, screen.width))
    for row in rows:
        for note in row["notes"]:
            screen.say(f"{row['method']}: {note}")
    if task.problems:
        screen.say(f"{counted(len(task.problems), what)} could not be used:")
        for problem in task.problems:
            screen.say(f"  {problem['path']}: {problem['reason']}")
    if failed:
        raise typer.Exit(1)
