"""The error of everything that reads a video."""

from __future__ import annotations

from os import PathLike
from typing import Any

__all__ = ["VideoError", "need"]


class VideoError(ValueError):
    """A video cannot be read, or not as asked.

    Attributes:
        path: the file.
        reason: what is wrong with it.
        step: what to do next.
    """

    def __init__(self, path: str | PathLike[str], reason: str, step: str) -> None:
        super().__init__(f"{path}: {reason}; {step}")
        self.path, self.reason, self.step = str(path), reason, step

    def __reduce__(self) -> tuple[Any, ...]:  # rebuilt from three arguments, not from the message, across processes
        return type(self), (self.path, self.reason, self.step)


def need(name: str) -> Any:
    """The module ``av`` or ``decord``; raises ``ImportError`` that names the extra to install."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        shown = {"av": "PyAV"}.get(name, name)
        raise ImportError(f"reading videos with {shown} needs it: pip install 'tokenreduce[video]'") from error
