"""What the benchmark scripts share: one model, unreduced and with each reduction that is named, as a table and rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from tokenreduce.reducer import Reducer

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
    used (``what``: images, questions). Every row goes to ``out`` as a JSON line when it is there.

    Exit status 1 when a row failed; what the unreduced model raises is raised.
    """
    from tokenreduce.cli.shared import complain, console

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")
    screen = console()
    screen.print(title, markup=False)
    with screen.status("loading, and evaluating the unreduced model"):
        task.prepare()
    rows: list[dict[str, Any]] = []
    failed = 0
    for reducers in [(), *chosen]:
        name = "+".join(r.spec() for r in reducers) or "unreduced"
        with screen.status(name):
            try:
                row = task.measure(reducers)
            except Exception as error:  # the rows that were measured already are worth keeping
                if not reducers:
                    raise
                failed += 1
                complain(f"{name} failed: {type(error).__name__}: {error}")
                continue
        row = {"method": name, **row, "share": row["flops"] / task.flops(())}
        rows.append(row)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**task.settings(), **row}) + "\n")
    screen.print(table(rows, screen.width))
    for row in rows:
        for note in row["notes"]:
            screen.print(f"{row['method']}: {note}", markup=False)
    if task.problems:
        screen.print(f"{len(task.problems)} {what} could not be used:")
        for problem in task.problems:
            screen.print(f"  {problem['path']}: {problem['reason']}", markup=False)
    if failed:
        raise typer.Exit(1)
