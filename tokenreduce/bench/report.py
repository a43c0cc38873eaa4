"""Reports made from run folders: a table for the terminal, CSV, the Pareto PNG and one self-contained HTML page."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tokenreduce.bench.columns import COLUMNS, Column, cell, columns, label, misses, ordered
from tokenreduce.bench.groups import MARKS
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.page import write_html
from tokenreduce.bench.picture import curves, pareto
from tokenreduce.bench.runs import OTHER_OUT, Run, load_run
from tokenreduce.bench.times import within_noise
from tokenreduce.common.files import make_folder, write_text

__all__ = ["rebuild", "table", "write_csv"]

#: Characters to which names of methods are folded before a column goes, and at the least.
FOLDED, LEAST = 24, 12
#: CSV columns that every row has, before and behind the results.
OWN = ("id", "method", "spec", "budget", "notes", "error")


def table(runs: Sequence[Run], width: int = 120) -> Table:
    """A rich table of the rows that fits ``width``; the caption names the columns that had to go, and long names of
    methods go over several lines, broken behind their settings.

    Baselines (random, uniform, resize, pool) are dim and marked with a degree sign.
    """
    shown = columns(runs)
    dropped: list[Column] = []
    names = [len(_name(row)) for run in runs for row in run.rows]
    room = max(names, default=0)
    while True:
        # Where all columns fit but for long names, those are folded; where names are short already, a column goes.
        over = _width(_table(runs, shown, dropped, room)) - width
        if over <= 0:
            return _table(runs, shown, dropped, room)
        droppable = [c for c in shown if c.drop]
        least = min(max(names, default=0), FOLDED)
        if room - over >= least or not droppable:
            room = max(room - over, LEAST)
            if _width(made := _table(runs, shown, dropped, room)) <= width or not droppable:
                return made
        worst = max(droppable, key=lambda c: c.drop)
        shown.remove(worst)
        dropped.append(worst)
        room = max(names, default=0)


def _width(made: Table) -> int:
    ruler = Console(width=10_000)
    return Measurement.get(ruler, ruler.options, made).maximum


def _name(row: dict[str, Any]) -> str:
    return label(row) + ("°" if is_baseline(row["method"]) else "")


def _folded(name: str, room: int) -> str:
    """``name`` on lines of at most ``room`` characters, broken behind ``:``, ``,`` and ``+`` as far as that goes."""
    lines = [""]
    for piece in re.findall(r"[^:,+]*[:,+]|[^:,+]+", name):
        if lines[-1] and len(lines[-1]) + len(piece) > room:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _table(runs: Sequence[Run], shown: Sequence[Column], dropped: Sequence[Column], room: int) -> Table:
    out = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, caption_justify="left")
    heads = [*(["run"] if len(runs) > 1 else []), "budget", "method", *(c.label for c in shown)]
    fixed = len(heads) - len(shown)
    for i, head in enumerate(heads):
        out.add_column(head, justify="left" if i < fixed else "right", no_wrap=i != fixed - 1, overflow="fold")
    for run in runs:
        before: Any = None
        rows = ordered(run)
        for row in rows:
            budget = row.get("budget")
            new = row["id"] != UNREDUCED and budget != before
            text = "" if row["id"] == UNREDUCED or not new else "-" if budget is None else f"{100 * budget:.4g} %"
            if new:
                before = budget
                out.add_section()
            baseline = is_baseline(row["method"])
            if row.get("error"):
                # The message stands below the table, whole.
                cells, look = ["error"] + [""] * (len(shown) - 1), "red"
            else:
                cells, look = [cell(row, c, run.axis) for c in shown], "dim" if baseline else ""
            if row["id"] == UNREDUCED:
                look = "bold"
            line = [*([run.folder.name] if len(runs) > 1 else []), text, _folded(_name(row), room), *cells]
            out.add_row(*(Text(t) for t in line), style=look)
        out.add_section()
    caption = "° baseline"
    off = dict.fromkeys(run.axis.label for run in runs if any(misses(row, run.axis) for row in run.good))
    if off:
        caption += f"; * other {' or '.join(off)} than the budget"
    if any(within_noise(row) for run in runs for row in run.good):
        caption += "; ≈ as fast within noise"
    if dropped:
        caption += f"; not shown here for want of width, but in rows.csv: {', '.join(c.label for c in dropped)}"
    out.caption = Text(caption)
    return out


def write_csv(runs: Sequence[Run], path: str | Path) -> Path:
    """All rows, unrounded: known columns first, then every other scalar that a row has. Lists are space separated."""
    known = [c.key for c in COLUMNS]
    errors = [f"{run.metric}_stderr" for run in runs]
    everything = dict.fromkeys(
        key for run in runs for row in run.rows for key, value in row.items()
        if key not in (*OWN, "settings", "traceback", MARKS) and (key in known or not isinstance(value, dict | list))
    )  # fmt: skip
    metrics = dict.fromkeys([*(run.metric for run in runs), *errors])
    first = [k for k in dict.fromkeys([*known, *metrics]) if k in everything]
    rest = sorted(k for k in everything if k not in first)
    head = ["run", *OWN[:4], *first, *rest, *OWN[4:]]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, head, extrasaction="ignore")
    writer.writeheader()
    for run in runs:
        for row in ordered(run):
            flat = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
            flat |= {"run": run.folder.name, "notes": "; ".join(map(str, row.get("notes") or []))}
            writer.writerow(flat)
    return write_text(path, file.getvalue(), OTHER_OUT)


def rebuild(folders: Sequence[str | Path], out: str | Path | None = None) -> tuple[list[Run], dict[str, Path]]:
    """Write ``rows.csv``, ``pareto.png`` and ``report.html`` from run folders, and return the runs and the files.

    ``out`` defaults to the folder of a single run, or to ``report`` beside the first of several. Raises
    ``FileNotFoundError`` or ``ValueError`` for a folder without a readable run, ``OSError`` for an unwritable ``out``.
    """
    if not folders:
        raise ValueError("name at least one run folder, for example runs/vision")
    runs = [load_run(f) for f in folders]
    if all(not run.rows for run in runs):
        raise ValueError(
            f"{', '.join(str(f) for f in folders)}: no row was measured yet; run `tokenreduce bench` first"
        )
    target = Path(out) if out is not None else runs[0].folder if len(runs) == 1 else runs[0].folder.parent / "report"
    make_folder(target, OTHER_OUT)
    command = shlex.join(["tokenreduce", "report", *(str(f) for f in folders), *(["--out", str(out)] if out else [])])
    files = {"csv": write_csv(runs, target / "rows.csv")}
    # A server that is asked as it is has no other budget to be drawn against.
    if any(curves(run) for run in runs) or not any(run.good for run in runs):
        files["png"] = pareto(runs, target / "pareto.png")
    files["html"] = write_html(runs, target / "report.html", command)
    return runs, files
