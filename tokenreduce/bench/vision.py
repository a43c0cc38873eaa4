"""The vision task: accuracy, FLOPs, clock time and memory of an image model with and without reducers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.bench.data import Batch, Images, load_data
from tokenreduce.bench.groups import MARKS, marks
from tokenreduce.bench.hits import NEIGHBOURS, Answers, agreement, correct, neighbours, scores
from tokenreduce.bench.models import Loaded, load_model
from tokenreduce.bench.reading import Problem
from tokenreduce.bench.vision_clock import clocked
from tokenreduce.bench.vision_parts import VisionPart, answer, check_place, merged
from tokenreduce.bench.workers import Pool, PoolMaker, Workers, devices_for
from tokenreduce.common.words import counted, whole
from tokenreduce.core.flops import gmacs
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import active, record
from tokenreduce.patching import describe, patched, twin

__all__ = ["VisionTask", "neighbours"]

#: Decoded images up to this many bytes stay in memory, so that a sweep decodes them once.
CACHE = 1 << 30
#: Images over which FLOPs and tokens are averaged where they depend on the image.
FLOP_IMAGES = 8
#: Data whose images have several labels each.
WORLDS = ("world", "world2")
#: Well-known methods, merging and pruning, for a sweep that takes a minute.
WELL_KNOWN = ("tome", "pitome", "evit", "tofu")


class _Cost(NamedTuple):
    flops: int
    tokens: list[float]
    entry: float
    notes: list[str]


@dataclass
class _Ready:
    """What :meth:`VisionTask.prepare` made. ``kept`` are the decoded batches where they fit into memory."""

    loaded: Loaded
    images: Images
    stock: nn.Module
    keep: bool
    kept: list[Batch] | None = None
    probe: Tensor = field(default_factory=lambda: torch.empty(0))
    baseline: Answers | None = None


@dataclass
class VisionTask:
    """One image model on one labelled data set, measured row by row.

    Args:
        model, data, split, limit, seed, classes: see :func:`~tokenreduce.bench.models.load_model` and
            :func:`~tokenreduce.bench.data.load_data`.
        batch: images per forward, in accuracy, timing and memory alike.
        workers: processes that decode images, in each process that has the model.
        processes: those that share the images, each with the model; what is counted and clocked is this one's.
        engine: makes them: on this machine, or on others (:mod:`tokenreduce.integrations.ray_data`).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        amp: ``bf16`` or ``fp16`` autocast.
        repeats: timed rounds; 0 leaves out clock time, memory and the reduction's share.
        threads: CPU threads while measuring; None leaves torch's setting.
        few: sweep :data:`WELL_KNOWN` methods only, besides the baselines, where no methods are named.

    A model without a head is evaluated by the nearest neighbours of its features (:func:`neighbours`). The scenes of
    the worlds have several labels each, see :func:`~tokenreduce.bench.hits.scores`. Bad settings raise ``ValueError``.
    """

    model: str = "digits-vit"
    data: str = "digits"
    split: str = "test"
    limit: int | None = None
    batch: int = 64
    workers: int = 0
    device: str = "cpu"
    amp: str | None = None
    repeats: int = 5
    threads: int | None = None
    seed: int = 0
    classes: str | Path | Sequence[str] | None = None
    few: bool = False
    processes: int = 1
    engine: PoolMaker = Workers

    name: ClassVar[str] = "vision"
    stages: ClassVar[tuple[str, ...]] = ("encoder",)

    _state: _Ready | None = field(default=None, init=False, repr=False)
    _source: tuple[Loaded, Images] | None = field(default=None, init=False, repr=False)
    _groups: dict[int, tuple[Batch | None, list[Problem]]] = field(default_factory=dict, init=False, repr=False)
    _pool: Pool | None = field(default=None, init=False, repr=False)
    _costs: dict[tuple[Reducer, ...], _Cost] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, least in (("batch", 1), ("workers", 0), ("repeats", 0), ("threads", 1), ("processes", 1)):
            value = getattr(self, key)
            if key == "threads" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key} is an int >= {least}, not {value!r}")
        check_place(self.device, self.amp)

    # -- the task ------------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Everything that makes two rows comparable (processes of any kind only change how fast answers come)."""
        keys = ("model", "data", "split", "limit", "batch", "device", "amp", "repeats", "threads", "seed")
        classes = self.classes if self.classes is None or isinstance(self.classes, str) else (
            str(self.classes) if isinstance(self.classes, Path) else list(self.classes)
        )  # fmt: skip
        return {**{key: getattr(self, key) for key in keys}, "classes": classes}

    def prepare(self) -> None:
        """Load model and data and evaluate the unreduced model; a second call does nothing.

        Raises what :func:`load_model` and :func:`load_data` raise, ``TypeError`` for a model without adapter and
        ``ValueError`` when no image can be read.
        """
        if self._state is not None:
            return
        self.load()
        assert self._source is not None
        loaded, images = self._source
        ready = _Ready(loaded, images, twin(loaded.model), self._fits(loaded, images))
        with _threads(self.threads):
            ready.baseline = self._answer(ready, loaded.model, ())
        self._state = ready

    def load(self) -> None:
        """Load model and data; raises as :meth:`prepare`. A second call does nothing."""
        if self._source is not None:
            return
        loaded = load_model(self.model, self.device)
        describe(loaded.model)
        images = load_data(self.data, self.split, loaded, self.limit, self.seed, self.classes)
        if loaded.kind == "zero-shot":
            loaded = loaded.with_classes(images.classes)
        if loaded.kind == "features" and self.data in WORLDS:
            raise ValueError(f"{self.model} has no head; scenes with several labels need a classifier (world-vit)")
        if loaded.kind == "features" and len(images) < 2:
            raise ValueError(f"{self.model} has no head and is evaluated by nearest neighbours; give at least 2 images")
        self._source = loaded, images

    @staticmethod
    def _fits(loaded: Loaded, images: Images) -> bool:
        """Whether all decoded images may stay in memory."""
        return 4 * math.prod(loaded.input_size) * len(images) <= CACHE

    def methods(self) -> list[str]:
        """Names of the encoder methods that the model can serve."""
        served = describe(self._ready.loaded.model).methods(self.stages[0])
        return [name for name in served if not self.few or name in WELL_KNOWN]

    @property
    def metric(self) -> str:
        """``accuracy`` where images have several labels, else ``top1``."""
        return "accuracy" if self.data in WORLDS else "top1"

    @property
    def _ready(self) -> _Ready:
        self.prepare()
        assert self._state is not None
        return self._state

    @property
    def loaded(self) -> Loaded:
        """The model, unpatched between rows."""
        return self._ready.loaded

    @property
    def images(self) -> Images:
        return self._ready.images

    @property
    def problems(self) -> list[dict[str, str]]:
        """Images that could not be used, with the reason."""
        found = [] if self._state is None else self._state.images.problems
        return [{"path": p.path, "reason": p.reason} for p in found]

    def sample(self, n: int = 1) -> Tensor:
        """The first images (n,C,H,W), fewer if there are not as many, on the device."""
        return self._ready.probe[:n].to(self.device)

    def flops(self, reducers: Sequence[Reducer]) -> int:
        """FLOPs of the image model per image, counted on one image at a time.

        Where they depend on the image (ragged methods) they are the mean over the first :data:`FLOP_IMAGES`.
        """
        return self._cost(tuple(reducers)).flops

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row. The model is as before afterwards, also after an error.

        ``tokens`` leave each layer, ``mean_tokens`` is their mean, ``entry_tokens`` enter the first layer; ``gmacs``
        and ``flops`` are per image; ``agreement`` is the share of images with the unreduced model's answer;
        ``speedup`` is the stock model's time over this one's, with its interval; ``peak_mb`` is 10^6 bytes above what
        was held before; ``reduction_share`` (CPU) the part of the forward that makes and applies plans.
        """
        ready, reducers = self._ready, tuple(reducers)
        assert ready.baseline is not None
        cost = self._cost(reducers)
        model = ready.loaded.model
        with _threads(self.threads), patched(model, *reducers) if reducers else nullcontext():
            # A trace of no module takes the notes of all batches and no steps.
            with record(nn.Identity(), flops=False) as trace:
                answers = self._answer(ready, model, reducers) if reducers else ready.baseline
            clock = self._clock(ready, bool(reducers)) if self.repeats else {}
        n = len(answers.y)
        classes = ready.loaded.num_classes or len(ready.images.classes)
        return {
            "tokens": cost.tokens,
            "final_tokens": cost.tokens[-1],
            "entry_tokens": cost.entry,
            "mean_tokens": sum(cost.tokens) / len(cost.tokens),
            "flops": cost.flops,
            "gmacs": gmacs(cost.flops),
            **scores(answers, classes),
            "agreement": agreement(answers, ready.baseline),
            "images": n,
            MARKS: marks(range(len(ready.images)), correct(answers)),
            "problems": len(ready.images.problems),
            **clock,
            "notes": self._notes(ready, reducers, answers, [*cost.notes, *trace.notes]),
        }

    def _notes(self, ready: _Ready, reducers: tuple[Reducer, ...], answers: Answers, said: list[str]) -> list[str]:
        notes = list(dict.fromkeys(said))
        if answers.broken:
            they = "it counts" if answers.broken == 1 else "they count"
            notes.append(f"{counted(answers.broken, 'image')} gave NaN or infinite outputs; {they} as wrong")
        if reducers:
            return notes
        if ready.loaded.kind == "features":
            k = min(NEIGHBOURS, len(answers.y) - 1)
            notes.append(f"the model has no head: top-1 is the leave-one-out accuracy of {k} nearest neighbours")
        if self.metric == "accuracy":
            notes.append(
                "a scene counts as right when its labels are the highest logits, as many as it has; "
                "found is the share of the labels that are among them"
            )
        if self.repeats and len(ready.probe) < self.batch:
            notes.append(
                f"time and memory are of {counted(len(ready.probe), 'image')}, fewer than the batch of {self.batch}"
            )
        return [*ready.loaded.notes, *ready.images.notes, *notes]

    # -- running -------------------------------------------------------------------------------------------------------
    def _batches(self, ready: _Ready) -> Iterator[Batch]:
        if ready.kept is not None:
            yield from ready.kept
            return
        seen: list[Batch] = []
        for batch in ready.images.batches(self.batch, self.workers):
            # The probe is the first full batch's worth of images, whatever the problems among them.
            if len(ready.probe) < max(self.batch, FLOP_IMAGES):
                ready.probe = batch.x if not len(ready.probe) else torch.cat([ready.probe, batch.x])
            if ready.keep:
                seen.append(batch)
            yield batch
        ready.kept = seen if ready.keep else None

    def _answer(self, ready: _Ready, model: nn.Module, reducers: tuple[Reducer, ...]) -> Answers:
        if self.processes == 1:
            batches = self._batches(ready)
            parts = [answer(ready.loaded, model, batch, self.device, self.amp) for batch in batches]
        else:
            parts = self._shared(ready, reducers)
        return merged(parts, ready.loaded, ready.images)

    def _shared(self, ready: _Ready, reducers: tuple[Reducer, ...]) -> list[VisionPart]:
        """Parts by other processes, in the order of the images."""
        if not len(ready.probe):
            for batch in ready.images.batches(self.batch):
                ready.probe = torch.cat([ready.probe, batch.x]) if len(ready.probe) else batch.x
                if len(ready.probe) >= max(self.batch, FLOP_IMAGES):
                    break
        if self._pool is None:
            tasks = [replace(self, processes=1, device=device) for device in devices_for(self.device, self.processes)]
            threads = self.threads or max(1, torch.get_num_threads() // self.processes)
            self._pool = self.engine(tasks, threads)
        there: dict[int, VisionPart] = dict(self._pool.run(reducers, range(math.ceil(len(ready.images) / self.batch))))
        parts = [there[unit] for unit in sorted(there)]
        trace = active()
        for part in parts:
            ready.images.add_problems(part.problems)
            for note in part.notes if trace is not None else ():
                trace.note(note)  # type: ignore[union-attr]
        return parts

    def part(self, reducers: tuple[Reducer, ...], unit: int) -> VisionPart:
        """Answers to the ``unit``-th batch, in one of :attr:`processes`. The model is as before afterwards."""
        assert self._source is not None
        loaded, images = self._source
        places = range(unit * self.batch, min((unit + 1) * self.batch, len(images)))
        batch, problems = self._groups.get(unit) or images.group(places)
        if self._fits(loaded, images):
            self._groups[unit] = batch, problems
        if batch is None:
            nothing = torch.zeros(0)
            return VisionPart(nothing, nothing, nothing, nothing, problems, [])
        with (
            patched(loaded.model, *reducers) if reducers else nullcontext(),
            record(nn.Identity(), flops=False) as trace,
        ):
            made = answer(loaded, loaded.model, batch, self.device, self.amp)
        return made._replace(problems=problems, notes=trace.notes)

    def close(self) -> None:
        """End the other processes; the next answers start them again."""
        if self._pool is not None:
            self._pool.close()

    def _clock(self, ready: _Ready, reduced: bool) -> dict[str, float | None]:
        return clocked(ready.loaded, ready.stock, self.sample(self.batch), reduced, self.repeats, self.amp)

    def _cost(self, reducers: tuple[Reducer, ...]) -> _Cost:
        if reducers not in self._costs:
            self._costs[reducers] = self._count(reducers)
        return self._costs[reducers]

    def _count(self, reducers: tuple[Reducer, ...]) -> _Cost:
        loaded = self._ready.loaded
        model = loaded.model
        seen: list[tuple[int, list[int], int]] = []
        notes: list[str] = []
        for image in self.sample(FLOP_IMAGES).split(1):
            with patched(model, *reducers) if reducers else nullcontext(), torch.no_grad():
                with record(model) as trace:
                    loaded.forward(model, image)
                flops = trace.flops
            if not reducers:  # an unpatched model reports no tokens: patch it with a method that never acts
                with patched(model, "tome:r=0"), torch.no_grad(), record(model, flops=False) as trace:
                    loaded.forward(model, image)
            first = trace.steps[0]
            seen.append((flops, trace.tokens, first.tokens if first.plan is None else first.plan.n))
            notes += trace.notes
            ragged = any(plan.validity() is not None for plan in trace.plans)
            if not reducers or (len(seen) == 2 and seen[0] == seen[1] and not ragged):
                break
        if any(one != seen[0] for one in seen):
            notes.append(
                f"what is kept depends on the image: tokens and FLOPs are means over {len(seen)} images, each run "
                "alone; in a batch all are padded to the longest"
            )
        tokens = [whole(sum(column) / len(seen)) for column in zip(*(t for _, t, _ in seen), strict=True)]
        flops = round(sum(f for f, _, _ in seen) / len(seen))
        return _Cost(flops, tokens, whole(sum(e for _, _, e in seen) / len(seen)), list(dict.fromkeys(notes)))


# -- helpers -----------------------------------------------------------------------------------------------------------
@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
