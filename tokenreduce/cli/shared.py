"""What the commands share: errors as one message, and the command line that repeats a call."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from tokenreduce.cli.commands import Tree
from tokenreduce.cli.optional import missing
from tokenreduce.common.files import writing
from tokenreduce.common.screen import complain, written_to
from tokenreduce.common.words import plain, speak_everywhere

__all__ = [
    "EXPECTED",
    "Friendly",
    "again",
    "numbers",
    "open_image",
    "picture_format",
    "print_json",
    "progress_bar",
    "quiet_bars",
    "run_program",
    "save_picture",
    "set_debug",
]

#: What bad input raises throughout the library; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError)


_debug = False


def set_debug(on: bool) -> None:
    """Whether errors keep their traceback."""
    global _debug
    _debug = on


def print_json(value: Any) -> None:
    """``value`` as one JSON object on standard output: numbers that are none (nan) become null, and what the
    terminal's encoding lacks is escaped."""
    wide = (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")
    text = json.dumps(plain(value), indent=2, ensure_ascii=not wide, allow_nan=False)
    with written_to("standard output"):
        typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


class Friendly(Tree):
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


def quiet_bars() -> None:
    """No progress bar of the weights where nobody watches it."""
    if sys.stderr.isatty():
        return
    import importlib.util

    if importlib.util.find_spec("transformers") is not None:
        from transformers.utils import logging

        logging.disable_progress_bar()


def progress_bar(screen: Any) -> Any:
    """A bar on ``screen`` with what is done, how far and how long; a context manager of rich."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    shown = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*shown, console=screen)


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
