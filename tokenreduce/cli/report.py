"""``tokenreduce report``: tables, CSV, picture and page again from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.cli.shared import again, print_json
from tokenreduce.common.screen import console

__all__ = ["command", "facts", "present"]


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print the table of one or several runs and write rows.csv, pareto.png and report.html again."""
    from tokenreduce.bench.markdown import write_markdown
    from tokenreduce.bench.report import rebuild

    loaded, files = rebuild(runs, out)
    if markdown is not None:
        given = {"out": out, "markdown": markdown}
        files["markdown"] = write_markdown(loaded, markdown, again(["report", *map(str, runs)], given, {}))
    if as_json:
        print_json(facts(loaded, files))
        return
    present(loaded, files)


def facts(runs: Any, files: Any) -> dict[str, Any]:
    """Rows as tables have them, notes, and the names of the files, as JSON can carry them."""
    from tokenreduce.bench.columns import label, notes, ordered
    from tokenreduce.bench.finding import finding

    return {
        "runs": [
            {
                "folder": str(run.folder), "task": run.info.get("task"), "metric": run.metric, "axis": run.axis.key,
                "settings": run.info.get("settings", {}), "problems": run.info.get("problems") or [],
                "rows": [{"label": label(row), **row} for row in ordered(run)], "notes": notes(run),
                "missing": run.missing, "finding": finding(run),
            }
            for run in runs
        ],
        "files": {name: str(path) for name, path in files.items()},
    }  # fmt: skip


def present(runs: Any, files: Any, apart: bool = False) -> None:
    """Table, notes and the names of the files; with ``apart`` a table for each run."""
    from tokenreduce.bench.columns import notes
    from tokenreduce.bench.finding import finding
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
                screen.say(name + line, "dim")
    for path in files.values():
        screen.say(f"wrote {path}")
    for run in runs:
        if said := finding(run):
            screen.say(f"{run.folder.name}: {said}" if len(runs) > 1 else said, "bold")
