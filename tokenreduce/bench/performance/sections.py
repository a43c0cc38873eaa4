"""Sections of docs/performance.md, which a command replaces between their marks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenreduce.common.files import write_text

__all__ = ["command_of", "deliver", "section", "splice"]


def section(name: str, head: Sequence[str], lines: Sequence[Sequence[str]], command: str, about: str) -> str:
    """A section with the command, the conditions and the table, between markers that carry ``name``."""
    text = [_mark(name, "begin"), f"`{command}`", "", about, ""]
    text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([*text, _mark(name, "end")]) + "\n"


def _mark(name: str, edge: str) -> str:
    return f"<!-- vlm-performance {name}: {edge} -->"


def splice(path: Path, name: str, section: str) -> None:
    """Put ``section`` between its markers in ``path``, which is made when it is not there.

    Raises ``ValueError`` for a file without the markers.
    """
    if not path.exists():
        write_text(path, section)
        return
    text, begin, end = path.read_text(encoding="utf-8"), _mark(name, "begin"), _mark(name, "end")
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        raise ValueError(f"{path} has no place for the figures: put the lines {begin!r} and {end!r} where they belong")
    write_text(path, text[:first] + section.rstrip("\n") + text[last + len(end) :])


def command_of(module: str, args: Sequence[str]) -> str:
    """The command that makes the figures, without the files they go to."""
    files = ("--markdown", "--picture")
    kept, skip = [], False
    for arg in args:
        if not skip and arg.split("=")[0] not in files:
            kept.append(arg)
        skip = arg in files
    return " ".join([f"python -m tokenreduce.bench.performance.{module}", *kept])


def deliver(
    module: str, columns: Sequence[str], lines: Sequence[Sequence[str]], about: str, markdown: Path | None,
    name: str | None = None,
) -> None:  # fmt: skip
    """Print what the command of ``module`` measured, and put it into its section (``name``, else the module's) of
    ``markdown`` where that is given. Raises ``ValueError`` for a file without that section."""
    table, screen = Table(*columns), Console(width=200)
    for line in lines:
        table.add_row(*line)
    screen.print(table)
    screen.print(about)
    if markdown is not None:
        name = module if name is None else name
        splice(markdown, name, section(name, columns, lines, command_of(module, sys.argv[1:]), about))
