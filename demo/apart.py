"""Running one function in a process of its own, so that what it does to files of strangers cannot take ours along."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["apart"]

#: What the process writes in front of a message for the user; anything else that it says is a crash.
TOLD = "tokenreduce:"


def apart(
    function: Callable[..., Mapping[str, Any]], *args: Any, seconds: float = 30.0, what: str = "the work"
) -> dict[str, Any]:
    """``function(*args)`` in a fresh process, which is killed when it takes longer than ``seconds``.

    ``function`` is defined at the top of an importable module and returns named arrays; ``args`` can be written as
    JSON. Nothing is unpickled on the way back. Raises ``ValueError`` with the text of what the function raises, and
    one that names ``what`` when the process dies or is too slow.
    """
    place = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-c", "from tokenreduce.demo.apart import main; main()", place, json.dumps(args)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what} took longer than {seconds:g} seconds and was given up") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").rpartition(TOLD)
        raise ValueError(said[2].strip() if said[1] else f"{what} ended without a result: the process that did it died")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as made:
        return {name: made[name] for name in made.files}


def main() -> None:
    """The process: reads what to call from the command line, writes arrays to standard output."""
    place, args = sys.argv[1:]
    module, _, name = place.partition(":")
    out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not get between the arrays
    try:
        made = getattr(importlib.import_module(module), name)(*json.loads(args))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{TOLD}{error}")
    except Exception as error:
        sys.exit(f"{TOLD}{type(error).__name__}: {error}")
    buffer = io.BytesIO()
    np.savez(buffer, **{key: np.asarray(value) for key, value in made.items()})  # type: ignore[arg-type]
    out.buffer.write(buffer.getvalue())
