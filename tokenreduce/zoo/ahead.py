"""Training batches made by other processes, ahead of the step that needs them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

__all__ = ["Ahead"]


class Ahead:
    """``Ahead(make, steps)(step)`` is ``make(step)``, made by ``workers`` processes while earlier steps run.

    ``make`` is picklable and depends on the step alone, so a run that is resumed sees the batches that it would have
    seen. Steps are asked for in order, from any first one. Without workers everything happens in this process.
    Raises ``ValueError`` for a step out of order. Use as a context manager: leaving it ends the processes.
    """

    def __init__(self, make: Callable[[int], Any], steps: int, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"workers is 0 or more, not {workers}")
        self.make, self.steps, self.workers = make, steps, workers
        self._waiting: deque[Future] = deque()
        self._pool: ProcessPoolExecutor | None = None
        self._next: int | None = None  # the step whose batch comes first
        self._asked = 0  # the first step that no process was asked for

    def __call__(self, step: int) -> Any:
        if not self.workers:
            return self.make(step)
        if self._pool is None:
            # A fork would copy torch's threads, and CUDA does not survive one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context)
            self._next = self._asked = step
        if step != self._next:
            raise ValueError(f"batches come in order: step {self._next} is next, not {step}")
        while len(self._waiting) < 3 * self.workers + 1 and self._asked < self.steps:
            self._waiting.append(self._pool.submit(self.make, self._asked))
            self._asked += 1
        self._next = step + 1
        return self._waiting.popleft().result()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._waiting.clear()
