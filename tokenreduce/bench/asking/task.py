"""A task that asks: settings, a source of questions, a runner and a meter, put together."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tokenreduce.bench.asking.log import AnswerLog, Part
from tokenreduce.bench.asking.meter import Clock, Meter, clock
from tokenreduce.bench.asking.runner import Answers, Runner
from tokenreduce.bench.asking.served import STAGES, Served, served
from tokenreduce.bench.asking.source import Source
from tokenreduce.bench.groups import MARKS, marks
from tokenreduce.bench.task import FLOPS, Axis
from tokenreduce.bench.vlms import DTYPES, LoadedVlm, load_vlm, pick_device
from tokenreduce.bench.workers import Pool, PoolMaker, Workers, devices_for
from tokenreduce.common.words import counted
from tokenreduce.core.flops import gmacs
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import record
from tokenreduce.patching import describe, patched

__all__ = ["AXES", "QuestionTask"]

#: By name, what budgets may be shares of.
AXES = {
    "flops": FLOPS,
    "tokens": Axis(
        "visual_share", "visual tokens", "visual tokens, mean over the language model's layers, % of the unreduced ones"
    ),
}


@dataclass
class _Ready:
    """What :meth:`QuestionTask.prepare` made; ``baseline`` are the unreduced model's answers, with what there was to
    say about them."""

    runner: Runner
    meter: Meter
    baseline: Answers
    said: list[str]
    served: Served | None = None


@dataclass
class QuestionTask(ABC):
    """One language model with visual tokens on questions, measured row by row. A task says where its questions come
    from (:meth:`source`), what is measured by the ``clock``, and its names and defaults.

    Args:
        model: ``world-llava``, a Hub id or a folder; see :func:`~tokenreduce.bench.vlms.load_vlm`.
        data, split, limit, seed: which questions.
        batch: questions per forward; prompts are padded on the left.
        device, dtype: as :func:`~tokenreduce.bench.vlms.load_vlm` takes them, but the device is a real one.
        repeats: timed rounds; 0 leaves out the time to the first token and the reduction's share.
        max_new_tokens: longest answer where answers are texts.
        stages: which methods the sweep tries; with ``few`` only :attr:`well_known` ones, besides the baselines.
        workers: processes that share the questions, each with the model; what is counted and clocked is this one's.
        against: what budgets are shares of, one of :data:`AXES`.
        engine: makes these processes: on this machine, or on others (:mod:`tokenreduce.integrations.ray_data`).

    Budgets are shares of FLOPs of vision encoder and prefill, or of the visual tokens, averaged over the layers of the
    language model: a method before it and one inside it cost the same there, but one inside the encoder saves more.
    Bad settings raise ``ValueError``.
    """

    model: str = "world-llava"
    data: str = "world"
    split: str = "test"
    limit: int | None = 400
    batch: int = 32
    device: str = "cpu"
    dtype: str = "auto"
    repeats: int = 5
    max_new_tokens: int = 16
    seed: int = 0
    stages: tuple[str, ...] = STAGES[:3]
    few: bool = False
    workers: int = 1
    against: str = "flops"
    engine: PoolMaker = Workers

    name: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]]
    #: By stage, what ``few`` leaves.
    well_known: ClassVar[Mapping[str, tuple[str, ...]]]
    #: Questions over which costs are averaged.
    probed: ClassVar[int]
    #: The stages whose methods leave fewer visual tokens, which budgets are shares of.
    measured: ClassVar[tuple[str, ...]] = STAGES[:3]
    #: Whether questions are about videos.
    films: ClassVar[bool] = False
    #: What makes the times of a row.
    clock: ClassVar[Clock] = staticmethod(clock)
    #: By name, what budgets may be shares of.
    axes: ClassVar[Mapping[str, Axis]] = AXES
    metric: ClassVar[str] = "accuracy"

    _state: _Ready | None = field(default=None, init=False, repr=False)
    _loaded: Runner | None = field(default=None, init=False, repr=False)
    _pool: Pool | None = field(default=None, init=False, repr=False)
    _log: AnswerLog | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, least in (("batch", 1), ("repeats", 0), ("max_new_tokens", 1), ("limit", 1), ("workers", 1)):
            value = getattr(self, key)
            if key == "limit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key} is an int >= {least}, not {value!r}")
        self.stages = tuple(dict.fromkeys(self.stages))
        if not self.stages or any(s not in self.measured for s in self.stages):
            raise ValueError(f"stages are among {', '.join(self.measured)}, not {', '.join(self.stages) or 'none'}")
        if self.against not in self.axes:
            raise ValueError(f"against is one of {', '.join(self.axes)}, not {self.against!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        pick_device(self.device)

    @property
    def axis(self) -> Axis:
        """What budgets are shares of."""
        return self.axes[self.against]

    @abstractmethod
    def source(self) -> Source:
        """The questions, loaded anew. Raises what loading them raises."""

    # -- the task ------------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Everything that makes two rows comparable (``workers`` only changes how fast answers come)."""
        keys = (
            "model", "data", "split", "limit", "batch", "device", "dtype", "repeats", "max_new_tokens", "seed",
            "against",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def prepare(self) -> None:
        """Load model and questions and answer all without reduction; a second call does nothing.

        Raises what :func:`load_vlm` and :meth:`source` raise, ``TypeError`` for a model without adapter and
        ``ValueError`` when no question can be used.
        """
        if self._state is not None:
            return
        self.load()
        runner = self._loaded
        assert runner is not None
        baseline, said = self._answers(())
        good = [item for item in runner.items if item.id in baseline.said]
        self._state = _Ready(runner, Meter(runner, good[: self.probed]), baseline, said)

    # -- answers, here and in other processes --------------------------------------------------------------------------
    def keep_in(self, folder: Path) -> None:
        """Keep answers in a run folder as they come, and take those that are there. Raises ``ValueError`` for a damaged
        file."""
        self._log = AnswerLog(folder)

    def load(self) -> None:
        """Load questions and model; raises as :meth:`prepare`."""
        if self._loaded is not None:
            return
        source = self.source()
        loaded = load_vlm(self.model, self.device, self.dtype)
        if describe(loaded.model).language is None:
            raise TypeError(f"{self.model} has no language model with visual tokens that an adapter knows")
        self._loaded = Runner(loaded, source, self.batch, self.max_new_tokens)

    def part(self, reducers: tuple[Reducer, ...], unit: int) -> Part:
        """Answers to the ``unit``-th group of questions. The model is as before afterwards."""
        runner = self._loaded
        assert runner is not None
        # A trace of no module takes the notes of all batches and no steps.
        with (
            patched(runner.loaded.model, *reducers) if reducers else nullcontext(),
            record(nn.Identity(), flops=False) as trace,
        ):
            made = runner.part(unit)
        return made._replace(notes=list(dict.fromkeys([*([] if reducers else runner.notes), *trace.notes])))

    def close(self) -> None:
        """End the other processes; the next answers start them again."""
        if self._pool is not None:
            self._pool.close()

    def _answers(self, reducers: tuple[Reducer, ...]) -> tuple[Answers, list[str]]:
        """Answers with ``reducers``, by this process or by :attr:`workers`, and what there is to say about them."""
        runner, key = self._loaded, json.dumps([r.to_json() for r in reducers])
        assert runner is not None
        there = dict(self._log.of(key)) if self._log is not None else {}
        todo = [unit for unit in range(len(runner.groups)) if unit not in there]
        died = 0 if self._pool is None else self._pool.died
        for unit, part in self._parts(reducers, todo):
            there[unit] = part
            if self._log is not None:
                self._log.add(key, unit, part)
        notes = [note for unit in sorted(there) for note in there[unit].notes]
        if self._pool is not None and self._pool.died > died:
            notes.append(f"{counted(self._pool.died - died, 'worker')} died; the questions were asked again")
        return runner.merged(there[unit] for unit in sorted(there)), list(dict.fromkeys(notes))

    def _parts(self, reducers: tuple[Reducer, ...], todo: list[int]) -> Iterator[tuple[int, Part]]:
        if self.workers == 1:
            yield from ((unit, self.part(reducers, unit)) for unit in todo)
            return
        if self._pool is None:
            devices = devices_for(self.device, self.workers)
            tasks = [replace(self, workers=1, device=device) for device in devices]
            self._pool = self.engine(tasks, max(1, torch.get_num_threads() // self.workers))
        yield from self._pool.run(reducers, todo)

    def methods(self) -> list[str]:
        """Full names of the methods that the model can serve, stage by stage."""
        wanted = [name for stage in self.stages for name in self.well_known[stage]]
        return [name for name in self._served.names if not self.few or name in wanted]

    @property
    def _served(self) -> Served:
        ready = self._ready
        if ready.served is None:
            ready.served = served(ready.meter, self.stages, self.films)
        return ready.served

    @property
    def _ready(self) -> _Ready:
        self.prepare()
        assert self._state is not None
        return self._state

    @property
    def runner(self) -> Runner:
        """What asks the model."""
        return self._ready.runner

    @property
    def meter(self) -> Meter:
        """What counts and clocks."""
        return self._ready.meter

    @property
    def loaded(self) -> LoadedVlm:
        """The model, unpatched between rows, and its processor."""
        return self.runner.loaded

    @property
    def problems(self) -> list[dict[str, str]]:
        """Questions that could not be used, with the reason."""
        found = {} if self._state is None else self._state.runner.source.problems
        return [found[key] for key in sorted(found)]

    def spent(self, reducers: Sequence[Reducer]) -> float:
        """What budgets are shares of, per question."""
        return self.meter.spent(reducers, self.axis == FLOPS)

    def flops(self, reducers: Sequence[Reducer]) -> int:
        """FLOPs of vision encoder and prefill per question: the mean over the first :attr:`probed`, each run alone."""
        return self.meter.cost(tuple(reducers)).flops

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row. The model is as before afterwards, also after an error.

        Per question: ``encoder_tokens`` leave the vision encoder, ``visual_tokens`` enter the language model,
        ``layer_tokens`` are in each of its layers and ``mean_visual_tokens`` is their mean; ``flops`` and
        ``cache_bytes`` are of a prefill. ``accuracy`` and, with question types, ``accuracy_<type>`` come with their
        standard errors. ``agreement`` is the share of questions with the unreduced model's answer. ``first_token_s`` is
        the time of a prefill of one question, and ``speedup`` the stock model's time over it. Further columns are those
        of the source and of the clock.
        """
        ready, reducers = self._ready, tuple(reducers)
        runner, meter, baseline = ready.runner, ready.meter, ready.baseline
        cost, dense = meter.cost(reducers), meter.cost(())
        answers, said = self._answers(reducers) if reducers else (baseline, ready.said)
        with patched(runner.loaded.model, *reducers) if reducers else nullcontext():
            times = type(self).clock(meter, bool(reducers), self.repeats) if self.repeats else {}
        same = [answers.said[i] == said for i, said in baseline.said.items() if i in answers.said]
        row: dict[str, Any] = {
            "encoder_tokens": cost.encoder,
            "visual_tokens": cost.layers[0],
            "layer_tokens": cost.layers,
            "mean_visual_tokens": sum(cost.layers) / len(cost.layers),
            "visual_share": sum(cost.layers) / sum(dense.layers),
            "flops": cost.flops,
            "gmacs": gmacs(cost.flops),
            **answers.accuracies(runner.items),
            **runner.source.graded(answers.said),
            "agreement": sum(same) / len(same),
            "questions": len(answers.right),
            MARKS: marks((item.id for item in runner.items), answers.right),
            "problems": len(runner.source.problems),
            "cache_bytes": cost.cache,
            **times,
        }
        row.update(runner.source.columns(meter.probes, row))
        return {**row, "notes": self._notes(reducers, answers, [*cost.notes, *said])}

    def _notes(self, reducers: tuple[Reducer, ...], answers: Answers, said: list[str]) -> list[str]:
        notes = list(dict.fromkeys(said))
        if answers.broken:
            they = "it counts" if answers.broken == 1 else "they count"
            notes.append(f"{counted(answers.broken, 'question')} gave NaN or infinite outputs; {they} as wrong")
        if reducers:
            return notes
        said = [*self.runner.source.notes, *self.runner.notes, *notes, *self._served.refused]
        return list(dict.fromkeys(said))
