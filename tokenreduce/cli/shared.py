"""What the commands share: consoles, errors as one message, and the command line that repeats a call."""

from __future__ import annotations

import shlex
import traceback
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

__all__ = [
    "Friendly",
    "again",
    "complain",
    "console",
    "numbers",
    "open_image",
    "picture_format",
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


def console() -> Console:
    """Where results go. Without a terminal (pipe, file, CI) lines are 160 wide, so that tables keep their columns."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made = Console(highlight=False, width=160)
    return made


def complain(message: str) -> None:
    """One message in red on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="bold red", markup=False)


class Friendly(TyperGroup):
    """Turns the library's exceptions into one message and exit status 2; ``--debug`` leaves them alone."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `tokenreduce ... | head`; the outer frame ends quietly
            raise
        except EXPECTED as error:
            if _debug:
                raise
            complain(f"error: {str(error) or type(error).__name__}")
            if not _deliberate(error):
                complain("This may be a bug: tokenreduce --debug ... shows where it came from.")
            raise typer.Exit(2) from None


def _deliberate(error: BaseException) -> bool:
    """Whether the library itself raised ``error`` on purpose, which makes its message the whole story."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (frames[-1].line or "").startswith("raise")


def numbers(text: str, option: str) -> list[float]:
    """``"0.75,0.5"`` to floats. Raises ``ValueError`` that names the option."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} lists numbers such as 0.75,0.5, not {text!r}") from None


def open_image(path: Path) -> Any:
    """The PIL image in a file. Raises ``FileNotFoundError`` and ``ValueError`` that name it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            return opened.copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def picture_format(path: Path, option: str) -> None:
    """Raise ``ValueError`` that names the option when the end of ``path`` is no picture format."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"cannot tell the picture format of {path}: end {option} in .png or .jpg")


def save_picture(picture: Any, path: Path, option: str) -> None:
    """Write ``picture``, making folders. Raises ``OSError`` that names the option."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another place with {option}") from error


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
