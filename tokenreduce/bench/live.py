"""A sweep that somebody watches while it runs, and may stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce.bench.runs import Run, load_run
from tokenreduce.bench.sweep import Point, Watch, sweep
from tokenreduce.bench.task import Task
from tokenreduce.bench.turns import Place, Turns

__all__ = ["Progress", "follow_sweep"]


@dataclass(frozen=True)
class Progress:
    """How far a sweep is: ``done`` of ``total`` rows, what is being measured ``now``, the ``run`` with its rows so far.

    ``state`` is "waiting" (with how many sweeps are ``ahead``), "running", "done" or "stopped"; ``said`` are messages
    of the sweep.
    """

    done: int
    total: int
    now: str
    run: Run | None = field(repr=False)
    state: str = "running"
    said: tuple[str, ...] = ()
    ahead: int = 0


class _Stop(Exception):  # noqa: N818 - no error
    """Somebody asked the sweep to stop; raised in the line or between two rows, so that rows on the disk are whole."""


def follow_sweep(
    task: Task,
    out: str | Path,
    stop: threading.Event,
    *,
    turn: AbstractContextManager[Any] | None = None,
    line: Turns | None = None,
    before: Callable[[], None] | None = None,
    **settings: Any,
) -> Iterator[Progress]:
    """Run :func:`~tokenreduce.bench.sweep.sweep` in a thread and yield a :class:`Progress` after every row.

    Sweeps with the same ``line`` go one after the other; one that waits yields its place whenever that changes, and a
    stop leaves the line at once. ``before`` is called in the thread when the turn has come (to load the model, say).

    The sweep ends behind the row it is at when ``stop`` is set or the iterator is closed; the same call continues
    there. ``turn`` (a lock) is held while a row is measured, so that others can have the machine between rows, and
    nobody's clock is disturbed. ``settings`` go to ``sweep``, and what it raises comes out here.
    """
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    ended = threading.Event()
    watch = _Watch(news, (stop, ended), turn if turn is not None else nullcontext())
    place = None if line is None else line.join()

    def work() -> None:
        try:
            if place is not None:
                watch.queue(place)
            if before is not None:
                before()
            news.put(("done", sweep(task, out, watch=watch, **settings)))
        except _Stop:
            news.put(("stopped", None))
        except BaseException as error:
            news.put(("error", error))
        finally:
            watch.leave()
            if place is not None:
                place.leave()

    threading.Thread(target=work, name="sweep", daemon=True).start()
    try:
        yield from _told(news, out)
    finally:
        ended.set()


def _told(news: queue.SimpleQueue[tuple[str, Any]], out: str | Path) -> Iterator[Progress]:
    """The news of a sweep as they come, up to its end."""
    total = done = 0
    now = "loading model and data"
    said: tuple[str, ...] = ()
    yield Progress(done, total, now, None)
    while True:
        kind, value = news.get()
        if kind == "error":
            raise value
        if kind == "queue":
            yield Progress(done, total, now, None, "waiting" if value else "running", said, value)
            continue
        if kind in ("done", "stopped"):
            run = value or (load_run(out) if done else None)
            yield Progress(done, total, "", run, kind, said)
            return
        if kind == "plan":
            total, done = value
        elif kind == "begin":
            now = value
        elif kind == "end":
            done += 1
        else:
            said = (*said, value)
        # Files are read again rather than shared with the thread that writes them.
        yield Progress(done, total, now, load_run(out) if done else None, said=said)


class _Watch(Watch):
    def __init__(self, news: Any, stops: tuple[threading.Event, ...], turn: AbstractContextManager[Any]) -> None:
        self.news, self.stops, self.turn, self.inside = news, stops, turn, False

    def queue(self, place: Place) -> None:
        """Wait for the turn, and tell the place whenever it changes."""
        told = 0
        while not place.wait(0.1):
            if (ahead := place.ahead) != told:
                self.news.put(("queue", told := ahead))
            self._check()
        if told:
            self.news.put(("queue", 0))

    def say(self, message: str) -> None:
        self.news.put(("say", message))

    def plan(self, total: int, done: int) -> None:
        self.news.put(("plan", (total, done)))
        self._check()

    def begin(self, point: Point) -> None:
        self._check()
        self.turn.__enter__()
        self.inside = True
        self.news.put(("begin", point.id))

    def end(self, point: Point, row: dict[str, Any]) -> None:
        self.leave()
        self.news.put(("end", point.id))

    def leave(self) -> None:
        if self.inside:
            self.inside = False
            self.turn.__exit__(None, None, None)

    def _check(self) -> None:
        if any(event.is_set() for event in self.stops):
            raise _Stop
