"""Ray instead of processes of this machine: parts of a task by Ray Data's ``map_batches`` and actors with the model.

The caller alone writes and decides, as with :class:`~tokenreduce.bench.workers.Workers`; an actor that dies is started
again by Ray and its part done again. Actors live as long as one row is measured: starting them takes some seconds, so
Ray is for jobs of minutes and for several machines, where model and data lie at the same place on each.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenreduce.bench.workers import DEATHS, Splittable, WorkerError, loaded_error, stored_error
from tokenreduce.core.reducer import Reducer

__all__ = ["RayPool"]


class _Actor:
    """A process of Ray with model and data; what goes wrong is told, not raised, so that it arrives as it was."""

    def __init__(self, task: bytes, specs: tuple[str, ...], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.failed: bytes | None = None
        try:
            self.task: Splittable = pickle.loads(task)
            self.reducers = tuple(Reducer.from_json(s) for s in specs)
            self.task.load()
        except Exception as error:
            self.failed = stored_error(error)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        told = []
        for unit in rows["unit"]:
            if self.failed is not None:
                told.append(pickle.dumps(("raised", self.failed)))
                continue
            try:
                told.append(pickle.dumps(("done", self.task.part(self.reducers, int(unit)))))
            except Exception as error:
                told.append(pickle.dumps(("raised", stored_error(error))))
        return {"unit": [int(unit) for unit in rows["unit"]], "told": told}


def _patience() -> dict[str, int]:
    """Ray would start actors of a part that kills them for ever."""
    return {"max_restarts": DEATHS, "max_task_retries": DEATHS}


@dataclass
class RayPool:
    """As many actors as there are ``tasks``, on the cluster at ``address``: ``auto`` for the one that is running,
    ``ray://HOST:PORT``, or None for one that is started here and ends with this process. ``threads`` are torch's in
    each.

    Raises ``ImportError`` without Ray, and :class:`OSError` where there is no cluster.
    """

    tasks: Sequence[Splittable]
    threads: int = 1
    address: str | None = None
    died: int = 0
    _started: bool = field(default=False, init=False, repr=False)

    def run(self, reducers: tuple[Reducer, ...], units: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """(unit, result) in the order in which they come.

        Raises what a part raised in an actor, and :class:`~tokenreduce.bench.workers.WorkerError` where actors die of
        one.
        """
        todo = list(units)
        if not todo:
            return
        ray = self._connect()
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
        count = min(len(self.tasks), len(todo))
        settings = (pickle.dumps(self.tasks[0]), tuple(r.to_json() for r in reducers), self.threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ray_remote_args_fn goes with Ray 2.64, and nothing else limits restarts
            done = rows.map_batches(
                _Actor, fn_constructor_args=settings, batch_size=1, compute=ray.data.ActorPoolStrategy(size=count),
                ray_remote_args_fn=_patience, **self._share(ray, count),
            )  # fmt: skip
        try:
            for row in done.iter_rows():
                kind, result = pickle.loads(row["told"])
                if kind == "raised":
                    raise loaded_error(result)
                yield int(row["unit"]), result
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()
            raise WorkerError(
                f"Ray gave up: {said[-1] if said else type(error).__name__}; what was found before is kept"
            ) from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _connect(self) -> Any:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'tokenreduce[ray]'") from error
        if not ray.is_initialized():
            self._reach()
            # Actors that take every core leave none for Ray's own tasks, and the job waits for ever.
            cores = None if self.address else max(os.cpu_count() or 1, len(self.tasks) + 1)
            try:
                ray.init(address=self.address, num_cpus=cores, log_to_driver=False, logging_level="ERROR")
            except ConnectionError as error:
                raise self._nowhere(str(error).splitlines()[0]) from error
            self._started = True
        return ray

    def _reach(self) -> None:
        """Raise ``OSError`` where nobody listens at :attr:`address`; Ray itself would try for minutes."""
        host, colon, port = (self.address or "").removeprefix("ray://").rpartition(":")
        if not colon or not port.isdigit():
            return
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise self._nowhere(error.strerror or str(error)) from error

    def _nowhere(self, why: str) -> OSError:
        return OSError(
            f"there is no Ray cluster at {self.address} ({why}); start one: ray start --head, or leave --address out"
        )

    def _share(self, ray: Any, count: int) -> dict[str, float]:
        """Cores and GPUs of one actor, so that a core is left for Ray's own tasks."""
        there = ray.cluster_resources()
        share: dict[str, float] = {"num_cpus": min(1.0, max(0.1, (there.get("CPU", 1) - 1) / count))}
        if str(getattr(self.tasks[0], "device", "cpu")).startswith("cuda"):
            gpus = there.get("GPU", 0)
            if not gpus:
                raise ValueError("the Ray cluster has no GPU; choose --device cpu")
            share["num_gpus"] = min(1.0, gpus / count)
        return share
