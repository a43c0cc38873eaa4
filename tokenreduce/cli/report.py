"""``tokenreduce report``: tables, CSV, picture and page again from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import again, console

__all__ = ["command", "present"]


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, for example runs/vision.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the files; a single run's own folder, or 'report' beside the first."
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write the tables as a Markdown page too; what was written by hand above them stays."),
    ] = None,
) -> None:
    """Print the table of one or several runs and write rows.csv, pareto.png and report.html again."""
    from tokenreduce.bench.markdown import write_markdown
    from tokenreduce.bench.report import rebuild

    loaded, files = rebuild(runs, out)
    if markdown is not None:
        given = {"out": out, "markdown": markdown}
        files["markdown"] = write_markdown(loaded, markdown, again(["report", *map(str, runs)], given, {}))
    present(loaded, files)


def present(runs: Any, files: Any, apart: bool = False) -> None:
    """Table, notes and the names of the files; with ``apart`` a table for each run."""
    from tokenreduce.bench.columns import notes
    from tokenreduce.bench.report import table

    screen = console()
    for together in [[run] for run in runs] if apart else [runs]:
        screen.print()
        if len(together) < len(runs):
            screen.print(together[0].folder.name, markup=False, style="bold")
        screen.print(table(together, screen.width))
        for run in together:
            name = "" if len(together) == 1 else f"{run.folder.name}: "
            for line in notes(run, brief=True):
                screen.print(name + line, markup=False, style="dim", soft_wrap=True)
    for path in files.values():
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
