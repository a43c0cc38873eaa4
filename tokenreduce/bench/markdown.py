"""Run folders as a Markdown page: for every budget a table of costs and accuracy, and one by question type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.columns import BY_TYPE, Column, again, cell, columns, label, notes, ordered
from tokenreduce.bench.finding import finding
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.runs import Run
from tokenreduce.common.files import write_text

__all__ = ["MARKER", "write_markdown"]

#: What stands above this line of an earlier page is kept: it was written by hand.
MARKER = "<!-- tables: everything below this line is written by the command -->"
#: Columns that a page leaves out; rows.csv of the run has them.
LEFT_OUT = ("tokens", "layer_tokens", "flops", "images_per_s", "peak_mb", "reduction_share", "top5")


def write_markdown(runs: Sequence[Run], path: str | Path, command: str = "") -> Path:
    """Write the page of ``runs``; text above :data:`MARKER` in an earlier page at ``path`` stays.

    Raises ``OSError`` when the file cannot be read or written.
    """
    path, head = Path(path), "# Results"
    parts = [part for run in runs for part in _run(run, len(runs) > 1)]
    if command:
        parts.append(f"The page again, from the rows: `{command}`\n")
    if path.is_file():
        before, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
        head = before.rstrip() if marker else head
    return write_text(path, "\n".join([f"{head}\n\n{MARKER}\n", *parts]), "choose another place with --markdown")


def _run(run: Run, several: bool) -> list[str]:
    settings = run.info.get("settings", {})
    hardware = run.info.get("hardware", {})
    title = " on ".join(str(settings[k]) for k in ("model", "data") if settings.get(k)) or run.folder.name
    parts = [f"## {title}: {run.folder.name}\n" if several and title != run.folder.name else f"## {title}\n"]
    if again(run):
        parts.append(f"Made by `{again(run)}`; {hardware.get('cpu', 'unknown processor')}, "
                     f"{hardware.get('threads', '?')} threads.\n")  # fmt: skip
    if said := finding(run):
        parts.append(f"**{said}**\n")
    shown = [c for c in columns([run]) if c.key not in LEFT_OUT]
    costs = [c for c in shown if not c.key.startswith(BY_TYPE)]
    kinds = [c for c in shown if c.key.startswith(BY_TYPE)]
    rows = ordered(run)
    top = [row for row in rows if row["id"] == UNREDUCED]
    for budget in dict.fromkeys(row.get("budget") for row in rows if row["id"] != UNREDUCED):
        group = [*top, *(r for r in rows if r["id"] != UNREDUCED and r.get("budget") == budget and not r.get("error"))]
        parts.append("### As given\n" if budget is None else f"### {100 * budget:.4g} % of the {run.axis.label}\n")
        parts.append(_table(run, group, costs))
        if kinds:
            parts.append("By question type:\n")
            parts.append(_table(run, group, kinds))
    if told := notes(run):
        parts.append("\n".join(f"- {line.strip()}" for line in told) + "\n")
    return parts


def _table(run: Run, rows: Sequence[dict[str, Any]], shown: Sequence[Column]) -> str:
    lines = ["| method | " + " | ".join(c.label for c in shown) + " |", "|---|" + "---|" * len(shown)]
    for row in rows:
        name = f"`{label(row)}`" + (" (baseline)" if is_baseline(row["method"]) else "")
        cells = (cell({k: v for k, v in row.items() if not _by_type_error(k)}, c, run.axis) for c in shown)
        lines.append(f"| {name} | " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _by_type_error(key: str) -> bool:
    """Standard errors by type would double the width of their table."""
    return key.startswith(BY_TYPE) and key.endswith("_stderr") and key != f"{BY_TYPE}stderr"
