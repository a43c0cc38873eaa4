"""Screens: where results, sentences and complaints are printed, whatever the terminal can show."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenreduce.common.files import cannot_write
from tokenreduce.common.words import speak_everywhere, spoken

__all__ = ["Screen", "UNLIMITED", "complain", "console"]

#: Columns where nobody watches (pipe, file, CI): tables keep one line per row, so that other programs can read them.
UNLIMITED = 10_000


class Screen(Console):
    """A console as wide as its terminal, as ``COLUMNS`` says where that is set, or without limit where it is neither.

    :meth:`say` prints sentences; tables go through ``print`` and fold to the width.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        speak_everywhere()
        super().__init__(highlight=False, stderr=stderr)
        # Programs with GNU readline (a Python with history, test runners) hand LINES and COLUMNS of nothing in
        # particular to what they start; somebody who means it sets COLUMNS alone.
        told = os.environ.get("COLUMNS", "").isdigit() and "LINES" not in os.environ
        self.limited = self.is_terminal or told
        if not self.limited:
            self.width = UNLIMITED

    def print(self, *objects: Any, **how: Any) -> None:
        if not self.encoding.startswith("utf"):
            for table in objects:
                if isinstance(table, Table):
                    _speak(table, self.encoding)
        with written_to("standard error" if self.stderr else "standard output"):
            super().print(*objects, **how)

    def say(self, text: str, style: str | None = None) -> None:
        """Print ``text``, broken between words at the width and never inside one; each line of it begins a new one."""
        for line in text.splitlines() or [""]:
            self.print(self._broken(line), style=style, markup=False, soft_wrap=True)

    def _broken(self, line: str) -> str:
        if not self.limited or len(line) <= self.width:
            return line
        indent = line[: len(line) - len(line.lstrip())]
        return textwrap.fill(
            line.strip(), self.width, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip


def _speak(table: Table, encoding: str) -> None:
    """Replace what the encoding lacks before the columns are laid out: two letters for a sign would shift them."""

    def told(value: Any) -> Any:
        if isinstance(value, Text):
            return Text(spoken(value.plain, encoding), style=value.style)
        return spoken(value, encoding) if isinstance(value, str) else value

    table.title, table.caption = told(table.title), told(table.caption)
    for column in table.columns:
        column.header = told(column.header)
        column._cells = [told(cell) for cell in column._cells]


def console(*, stderr: bool = False) -> Screen:
    """Where results go; with ``stderr`` what is said beside them, so that ``--json`` has standard output alone."""
    return Screen(stderr=stderr)


def complain(message: str) -> None:
    """One message in red on stderr, on one line where nobody watches."""
    screen = Screen(stderr=True)
    screen.limited = screen.is_terminal
    screen.say(message, style="bold red")


@contextmanager
def written_to(where: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # `tokenreduce ... | head` is no error
        raise
    except OSError as error:
        raise cannot_write(f"to {where}", error, "send it elsewhere, or make room") from error
