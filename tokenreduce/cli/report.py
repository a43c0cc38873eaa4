"""``tokenreduce report``: tables, CSV, picture and page again from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import console

__all__ = ["command", "present"]


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, for example runs/vision.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the files; a single run's own folder, or 'report' beside the first."
        ),
    ] = None,
) -> None:
    """Print the table of one or several runs and write rows.csv, pareto.png and report.html again."""
    from tokenreduce.bench.report import rebuild

    loaded, files = rebuild(runs, out)
    present(loaded, files)


def present(runs: Any, files: Any) -> None:
    """Table, notes and the names of the files."""
    from tokenreduce.bench.columns import notes
    from tokenreduce.bench.report import table

    screen = console()
    screen.print()
    screen.print(table(runs, screen.width))
    for run in runs:
        for line in notes(run, brief=True):
            screen.print(
                ("" if len(runs) == 1 else f"{run.folder.name}: ") + line, markup=False, style="dim", soft_wrap=True
            )
    for path in files.values():
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
