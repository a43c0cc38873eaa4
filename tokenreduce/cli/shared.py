"""What the commands share: screens, errors as one message, and the command line that repeats a call."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tokenreduce.cli.optional import missing
from tokenreduce.common.files import cannot_write, writing
from tokenreduce.common.words import speak_everywhere, spoken

__all__ = [
    "Friendly",
    "Screen",
    "again",
    "complain",
    "console",
    "numbers",
    "open_image",
    "picture_format",
    "print_json",
    "run_program",
    "save_picture",
    "set_debug",
]

#: What bad input raises throughout the library; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError)
#: Columns where nobody watches (pipe, file, CI): tables keep one line per row, so that other programs can read them.
UNLIMITED = 10_000
_debug = False


def set_debug(on: bool) -> None:
    """Whether errors keep their traceback."""
    global _debug
    _debug = on


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
        with _written("standard error" if self.stderr else "standard output"):
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


def print_json(value: Any) -> None:
    """``value`` as one JSON object on standard output: numbers that are none (nan) become null, and what the
    terminal's encoding lacks is escaped."""
    from tokenreduce.bench.task import plain

    wide = (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")
    text = json.dumps(plain(value), indent=2, ensure_ascii=not wide, allow_nan=False)
    with _written("standard output"):
        typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def _written(where: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # `tokenreduce ... | head` is no error
        raise
    except OSError as error:
        raise cannot_write(f"to {where}", error, "send it elsewhere, or make room") from error


class Friendly(TyperGroup):
    """Turns the library's exceptions into one message and exit status 2; ``--debug`` leaves them alone."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        speak_everywhere()  # help texts and errors of usage are printed before any command runs
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `tokenreduce ... | head`; the outer frame ends quietly
            raise
        except EXPECTED as error:
            if _debug:
                raise
            lacking = missing(error)
            complain(f"error: {lacking or str(error) or type(error).__name__}")
            if not lacking and not _deliberate(error):
                complain("This may be a bug: tokenreduce --debug ... shows where it came from.")
            raise typer.Exit(2) from None


def _deliberate(error: BaseException) -> bool:
    """Whether the library itself raised ``error`` on purpose, which makes its message the whole story."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (frames[-1].line or "").startswith("raise")


def run_program(app: Any, name: str) -> None:
    """Run a script of its own like a command: bad input becomes one message and exit status 2."""
    speak_everywhere()
    try:
        app(prog_name=name)
    except EXPECTED as error:
        complain(f"error: {missing(error) or error}")
        sys.exit(2)


def numbers(text: str, option: str) -> list[float]:
    """``"0.75,0.5"`` to floats. Raises ``ValueError`` that names the option."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} lists numbers such as 0.75,0.5, not {text!r}") from None


def open_image(path: Path) -> Any:
    """The PIL image in a file, as a viewer shows it. Raises ``FileNotFoundError`` and ``ValueError`` that name it."""
    from tokenreduce.common.images import open_picture

    return open_picture(path)


def picture_format(path: Path, option: str) -> None:
    """Raise ``ValueError`` that names the option when the end of ``path`` is no picture format."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"cannot tell the picture format of {path}: end {option} in .png or .jpg")


def save_picture(picture: Any, path: Path, option: str) -> None:
    """Write ``picture``, making folders. Raises ``OSError`` that names the option."""
    with writing(path, f"choose another place with {option}") as partial:
        picture.save(partial)


def again(words: list[str], given: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command line with every option that differs from its default, quoted for a shell."""
    line = ["tokenreduce", *words]
    for name, value in given.items():
        if value == defaults.get(name) or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else f"--no-{flag[2:]}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                line += [flag, str(one)]
    return shlex.join(line)
