"""Processes that share one task: each has model and data, takes parts of the inputs, and sends back what it found.

The caller alone writes and decides; a worker that dies (killed, out of memory) is replaced and its part done again, so
that nothing is lost. Parts are what one process would have done in one go, so results are the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from tokenreduce.core.reducer import Reducer

__all__ = ["Pool", "PoolMaker", "Splittable", "WorkerError", "Workers", "devices_for", "loaded_error", "stored_error"]

#: A part that ends so many workers, or a worker that ends so often before it is ready, is given up.
DEATHS = 3


class Splittable(Protocol):
    """What a worker runs; sent to it by pickle before anything was loaded."""

    def load(self) -> None:
        """Load model and data."""
        ...

    def part(self, reducers: tuple[Reducer, ...], unit: int) -> Any:
        """What is found on one part of the inputs; goes back by pickle."""
        ...


class Pool(Protocol):
    """Processes that share a task: :class:`Workers` on this machine, or those of another engine. ``died`` counts those
    that had to be replaced."""

    died: int

    def run(self, reducers: tuple[Reducer, ...], units: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """(unit, result) in the order in which they come; raises as :meth:`Workers.run`."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class PoolMaker(Protocol):
    """Makes a pool of one process per task, each with so many threads; ``Workers`` is one."""

    def __call__(self, tasks: Sequence[Splittable], threads: int) -> Pool: ...


class WorkerError(RuntimeError):
    """Workers die of a part, or cannot load."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    ready: bool = False
    unit: int | None = None


def devices_for(device: str, count: int) -> list[str]:
    """The devices of ``count`` workers: on ``cuda`` all GPUs in turn, otherwise the same for each.

    >>> devices_for("cpu", 2), devices_for("cuda:1", 2)
    (['cpu', 'cpu'], ['cuda:1', 'cuda:1'])
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i % gpus}" if gpus else device for i in range(count)]


@dataclass
class Workers:
    """One process per task of ``tasks``, which differ in their device alone. They start with the first :meth:`run` and
    stay; ``died`` counts those that had to be replaced. ``threads`` are torch's in each."""

    tasks: Sequence[Splittable]
    threads: int = 1
    died: int = 0
    _running: list[_Worker] = field(default_factory=list, init=False, repr=False)

    def run(self, reducers: tuple[Reducer, ...], units: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """(unit, result) in the order in which they come.

        Raises what :meth:`Splittable.part` raised in a worker, and :class:`WorkerError` where workers die of a part or
        do not start.
        """
        todo, specs = deque(units), tuple(r.to_json() for r in reducers)
        if not todo:
            return
        if not self._running:
            self._running = [self._start(task) for task in self.tasks]
        try:
            yield from self._shared(todo, specs)
        finally:
            # Whoever stops listening must not be told about these parts when he asks for others.
            if any(w.unit is not None for w in self._running):
                self.close()

    def _shared(self, todo: deque[int], specs: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
        deaths: Counter[int] = Counter()
        failed: Exception | None = None
        while (todo and failed is None) or any(w.unit is not None for w in self._running):
            self._hand_out(todo if failed is None else deque(), specs)
            for at in self._heard():
                worker = self._running[at]
                try:
                    kind, result = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(at, todo, deaths)
                    continue
                unit, worker.unit = worker.unit, None
                if kind == "ready":
                    worker.ready = True
                    deaths[-1] = 0
                elif kind == "raised":
                    failed = failed or loaded_error(result)
                    if not worker.ready:  # it could not load, and no other will
                        self.close()
                        raise failed
                else:
                    assert unit is not None
                    yield unit, result
        if failed is not None:
            raise failed

    def close(self) -> None:
        """End all processes."""
        for worker in self._running:
            worker.process.terminate()
            worker.pipe.close()
        for worker in self._running:
            worker.process.join()
        self._running = []

    def _start(self, task: Splittable) -> _Worker:
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(task, its, self.threads), daemon=True)
        process.start()
        its.close()
        return _Worker(process, mine)

    def _hand_out(self, todo: deque[int], specs: tuple[str, ...]) -> None:
        for worker in self._running:
            if worker.ready and worker.unit is None and todo:
                worker.unit = todo.popleft()
                with contextlib.suppress(OSError):  # it is gone; reading from it says so
                    worker.pipe.send((specs, worker.unit))

    def _heard(self) -> list[int]:
        """Which workers have something to say, or are gone."""
        places: dict[Any, int] = {w.pipe: i for i, w in enumerate(self._running)}
        return [places[c] for c in wait(list(places))]

    def _replace(self, at: int, todo: deque[int], deaths: Counter[int]) -> None:
        gone = self._running[at]
        gone.process.join()
        gone.pipe.close()
        self.died += 1
        unit = -1 if gone.unit is None else gone.unit
        deaths[unit] += 1
        if gone.unit is not None:
            todo.appendleft(gone.unit)
        if deaths[unit] >= DEATHS:
            code = gone.process.exitcode
            self._running.pop(at)
            self.close()
            what = "before they were ready" if unit < 0 else f"at part {unit}"
            raise WorkerError(
                f"{DEATHS} workers died {what} (exit status {code}{', out of memory?' if code == -9 else ''}); what "
                "was found before is kept. Fewer --workers need less memory"
            )
        self._running[at] = self._start(self.tasks[at])


def _serve(task: Splittable, pipe: Connection, threads: int) -> None:
    """What a worker does until its caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's matter
    torch.set_num_threads(threads)
    try:
        task.load()
    except Exception as error:
        pipe.send(("raised", stored_error(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            specs, unit = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            told: tuple[str, Any] = "done", task.part(tuple(Reducer.from_json(s) for s in specs), unit)
        except Exception as error:
            told = "raised", stored_error(error)
        pipe.send(told)


def stored_error(error: Exception) -> bytes:
    """``error`` for another process: itself where pickle gives it back, else its words."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def loaded_error(data: bytes) -> Exception:
    """What :func:`stored_error` stored."""
    made: Exception = pickle.loads(data)
    return made
