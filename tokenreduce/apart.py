"""Running one function in a process of its own, so that what it does to files of strangers cannot take ours along."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

__all__ = ["apart"]


def apart(
    function: Callable[..., Any], *args: Any, seconds: float = 30.0, what: str = "the work", **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)`` in a fresh process, which is killed when it takes longer than ``seconds``.

    ``function`` is defined at the top of an importable module; arguments and result go through a pipe. Raises what the
    function raises (``ValueError`` with its text where that cannot travel), and ``ValueError`` naming ``what`` when the
    process dies or is too slow.
    """
    methods = multiprocessing.get_all_start_methods()
    # A forked child of a process with threads may hang; the fork server has none.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, function, args, kwargs), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise ValueError(f"{what} took longer than {seconds:g} seconds and was given up")
        good, value = here.recv()
    except EOFError:
        raise ValueError(f"{what} ended without a result: the process that did it died") from None
    finally:
        here.close()
        process.kill()
        process.join()
    if good:
        return value
    raise value


def _run(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        answer = True, function(*args, **kwargs)
    except (ValueError, OSError, ImportError) as error:
        answer = False, ValueError(str(error)) if not isinstance(error, ImportError) else ImportError(str(error))
    except Exception as error:
        answer = False, ValueError(f"{type(error).__name__}: {error}")
    pipe.send(answer)
    pipe.close()
