"""What loading takes everywhere: optional libraries, options, seeded weights, and errors that say what to do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

__all__ = ["NETWORK", "first_lines", "known", "library", "seeded", "unavailable"]

#: What to do where a download fails.
NETWORK = "check the network, or load it once where there is one (the hub's cache is used afterwards)"


def known(name: str, options: dict[str, Any], valid: tuple[str, ...]) -> None:
    """Raises ``ValueError`` for an option of ``name`` that is none of ``valid``."""
    for key in options:
        if key not in valid:
            raise ValueError(f"{name!r}: unknown option {key!r}; valid options: {', '.join(valid)}")


def library(name: str, extra: str) -> ModuleType:
    """Module ``name``. Raises ``ImportError`` that names the ``extra`` where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'tokenreduce[{extra}]'") from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights from ``seed``; the caller's random numbers stay where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def first_lines(error: BaseException) -> str:
    """The beginning of a message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) < 400 else text[:400] + "..."


def unavailable(name: str, error: BaseException, fix: str) -> OSError:
    """The error to raise where weights of ``name`` cannot be had; ``fix`` says what helps."""
    return OSError(f"cannot load the weights of {name}: {first_lines(error)} Fix: {fix}")
