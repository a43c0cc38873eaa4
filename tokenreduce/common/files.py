"""Writing files whole or not at all, with errors that name the file and the reason."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from io import FileIO
from pathlib import Path

__all__ = [
    "append",
    "append_line",
    "cache_folder",
    "cannot_write",
    "make_folder",
    "write_bytes",
    "write_text",
    "writing",
]


def cache_folder() -> Path | None:
    """Where tokenreduce keeps what can be made again: ``TOKENREDUCE_CACHE``, or a folder in the system's own place for
    such things. None where there is no home, or the variable is empty."""
    if (own := os.environ.get("TOKENREDUCE_CACHE")) is not None:
        return Path(own) if own else None
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "tokenreduce"


def cannot_write(path: str | Path, error: OSError, step: str = "choose another place") -> OSError:
    """The error to raise where ``path`` could not be written: what, why, and the next step."""
    why = error.strerror or str(error) or type(error).__name__
    if isinstance(error, FileExistsError | NotADirectoryError):
        why = "a file is where a folder should be"
    made = OSError(f"cannot write {path}: {why}; {step}")
    made.errno = error.errno
    return made


def make_folder(path: str | Path, step: str = "choose another place") -> Path:
    """Make a folder with its parents. Raises ``OSError`` that names it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(f"to {path}", error, step) from error
    return path


@contextmanager
def writing(path: str | Path, step: str = "choose another place") -> Iterator[Path]:
    """A temporary file beside ``path``, with its ending, that takes its place when the block ends well.

    Until then an earlier file stays as it is, and after an error nothing is left behind. What is no regular file
    (``/dev/stdout``, a pipe) is written directly. Raises ``OSError`` that names ``path``, the reason and ``step`` where
    it, or its folder, cannot be written.
    """
    path = Path(path)
    make_folder(path.parent, step)
    try:
        target = path.resolve()  # a link stays one, and what it points to is replaced
        special = target.exists() and not target.is_file()
    except OSError as error:
        raise cannot_write(path, error, step) from error
    partial = path if special else target.with_name(f".{secrets.token_hex(4)}.partial{target.suffix}")
    try:
        yield partial
        if not special:
            if target.exists():
                os.chmod(partial, target.stat().st_mode & 0o777)
            os.replace(partial, target)
    except OSError as error:
        _remove(partial, special)
        raise cannot_write(path, error, step) from error
    except BaseException:
        _remove(partial, special)
        raise


def _remove(partial: Path, special: bool) -> None:
    if not special:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes, step: str = "choose another place") -> Path:
    """Write ``data`` as :func:`writing` does; returns the path."""
    with writing(path, step) as partial:
        partial.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str, step: str = "choose another place") -> Path:
    """Write ``text`` in UTF-8, whatever the locale is, as :func:`writing` does; returns the path.

    Names of files that are no text on this system (lone surrogates) come out as escapes.
    """
    return write_bytes(path, text.encode("utf-8", "backslashreplace"), step)


def append(handle: FileIO, data: bytes, path: str | Path, step: str = "choose another place") -> None:
    """Add ``data`` at the end of an open, unbuffered file and wait until it is on the disk: all of it or nothing.

    Raises ``OSError`` that names ``path``, the reason and ``step``.
    """
    before = os.fstat(handle.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[handle.write(rest) or 0 :]
        with suppress(OSError) if not _regular(handle) else nullcontext():
            os.fsync(handle.fileno())
    except BaseException as error:
        if _regular(handle):
            with suppress(OSError):
                handle.truncate(before)
        if isinstance(error, OSError):
            raise cannot_write(path, error, step) from error
        raise


def _regular(handle: FileIO) -> bool:
    return stat.S_ISREG(os.fstat(handle.fileno()).st_mode)


def append_line(path: str | Path, line: str, step: str = "choose another place") -> None:
    """Add one line of UTF-8 to a file that need not be there yet, as :func:`append` does."""
    make_folder(Path(path).parent, step)
    try:
        handle = open(path, "ab", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise cannot_write(path, error, step) from error
    with handle:
        append(handle, line.encode("utf-8", "backslashreplace") + b"\n", path, step)
