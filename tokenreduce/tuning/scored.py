"""A model with its data as a search needs it: what a setting scores on a part, and what it costs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tokenreduce.bench.asking.meter import Meter
from tokenreduce.bench.asking.runner import Runner, quiet
from tokenreduce.bench.asking.served import served
from tokenreduce.bench.asking.source import Source
from tokenreduce.bench.data import Images, load_data
from tokenreduce.bench.hits import Answers, ranks, scores
from tokenreduce.bench.models import Loaded, load_model
from tokenreduce.bench.vlm import VlmTask
from tokenreduce.bench.vlms import load_vlm
from tokenreduce.core.flops import count_flops
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class
from tokenreduce.patching import describe, family_of, patched
from tokenreduce.tuning.part import Parts, parts

__all__ = ["ImageScored", "QuestionScored", "Score", "Scored"]


#: Samples over which costs are averaged, each run alone: what some methods keep depends on what they see.
PROBES = 3


class Score(NamedTuple):
    """Shares of ``n`` samples that are right."""

    value: float
    stderr: float
    n: int


class Scored(ABC):
    """``names`` are methods that may be chosen from, by stage, ``known`` the well-known of them."""

    model: nn.Module
    parts: Parts
    stages: tuple[str, ...]
    known: tuple[str, ...]

    def __init__(self) -> None:
        self._scores: dict[tuple[tuple[Reducer, ...], str], Score] = {}
        self._costs: dict[tuple[tuple[Reducer, ...], str], float] = {}

    @property
    def family(self) -> str:
        return family_of(self.model)

    def names(self) -> dict[str, list[str]]:
        """Methods with a ``keep``, without those that choose at random."""
        out: dict[str, list[str]] = {stage: [] for stage in self.stages}
        for name in self._served():
            kind = get_class(name)
            plain = kind.name.partition("@")[0]
            if "keep" in {*getattr(kind, "__dataclass_fields__", ())} and plain not in ("random", "uniform"):
                out[kind.stage].append(name)
        return {stage: names for stage, names in out.items() if names}

    def score(self, reducers: tuple[Reducer, ...], part: str) -> Score:
        """``part`` is a field of :class:`Parts`. Measured once; the model is as before afterwards."""
        key = reducers, part
        if key not in self._scores:
            with patched(self.model, *reducers) if reducers else nullcontext(), quiet():
                self._scores[key] = self._score(part)
        return self._scores[key]

    def cost(self, reducers: tuple[Reducer, ...], kind: str) -> float:
        """FLOPs, or bytes of the cache, of one sample. Counted once."""
        key = reducers, kind
        if key not in self._costs:
            with patched(self.model, *reducers) if reducers else nullcontext(), quiet():
                self._costs.update({(reducers, k): v for k, v in self._cost().items()})
        return self._costs[key]

    @abstractmethod
    def _served(self) -> Sequence[str]: ...

    @abstractmethod
    def _score(self, part: str) -> Score: ...

    @abstractmethod
    def _cost(self) -> dict[str, float]: ...


class ImageScored(Scored):
    """A model of images on labelled ones; see :func:`~tokenreduce.bench.data.load_data` for data and errors."""

    stages = ("encoder",)
    known = ("tome", "pitome", "evit", "diffrate", "mctf")

    def __init__(self, model: str, data: str, limit: int | None, seed: int, device: str, batch: int) -> None:
        super().__init__()
        loaded: Loaded = load_model(model, device)
        images = load_data(data, "test", loaded, limit, seed)
        if loaded.kind == "zero-shot":
            loaded = loaded.with_classes(images.classes)
        if loaded.kind == "features":
            raise ValueError(f"{model} has no head to score; give a classifier, or a zero-shot model")
        self.loaded, self.model, self.batch, self.device = loaded, loaded.model, batch, device
        self.parts = parts(len(images), seed)
        self._images = {name: _some(images, at) for name, at in self.parts._asdict().items()}
        self._kept: dict[str, list[Any]] = {}
        self._probes: Any = None

    def _served(self) -> Sequence[str]:
        return describe(self.model).methods("encoder")

    def _score(self, part: str) -> Score:
        labels, outputs = [], []
        for made in self._batches(part):
            with torch.inference_mode():
                out = self.loaded.predict(made.x.to(self.device)).float().nan_to_num(float("-inf"))
            labels.append(made.y)
            outputs.append(out.topk(ranks(made.y, out.shape[-1]), -1).indices.cpu())
        y = torch.cat(labels)
        found = scores(Answers(torch.arange(len(y)), y, torch.cat(outputs), 0), self.loaded.num_classes)
        key = "accuracy" if y.ndim == 2 else "top1"
        return Score(found[key] or 0.0, found[f"{key}_stderr"] or 0.0, len(y))

    def _cost(self) -> dict[str, float]:
        if self._probes is None:
            self._probes = next(iter(self._batches("first"))).x[:PROBES].to(self.device)
        counted: list[int] = []
        for image in self._probes.split(1):
            counted.append(count_flops(self.loaded.forward, self.model, image))
            if len(counted) == 2 and counted[0] == counted[1]:  # what is kept does not depend on the image
                break
        return {"flops": sum(counted) / len(counted)}

    def _batches(self, part: str) -> list[Any]:
        if part not in self._kept:
            self._kept[part] = list(self._images[part].batches(self.batch))
        return self._kept[part]


def _some(images: Images, at: list[int]) -> Images:
    return replace(images, items=[images.items[i] for i in at], labels=[images.labels[i] for i in at])


class QuestionScored(Scored):
    """An image language model on questions; see :class:`~tokenreduce.bench.vlm.VlmTask`. Costs are means over a few."""

    known = ("visionzip", "vispruner", "divprune", "fastervlm", "fastv", "pyramiddrop", "tome", "mctf")

    def __init__(
        self, model: str, data: str, limit: int | None, seed: int, device: str, batch: int, stages: tuple[str, ...]
    ) -> None:
        super().__init__()
        task = VlmTask(model, data, limit=limit, batch=batch, device=device, seed=seed, stages=stages)
        source = task.source()
        self.stages = task.stages
        self.parts = parts(len(source.items), seed)
        loaded = load_vlm(model, device)
        self.model = loaded.model
        if describe(self.model).language is None:
            raise TypeError(f"{model} has no language model with visual tokens that an adapter knows")
        cut = self.parts._asdict().items()
        self._runners = {name: Runner(loaded, _few(source, at), batch, task.max_new_tokens) for name, at in cut}
        self._meter = Meter(self._runners["first"], self._runners["first"].items[:PROBES])

    def _served(self) -> Sequence[str]:
        return served(self._meter, self.stages, films=False).names

    def _score(self, part: str) -> Score:
        runner = self._runners[part]
        answers = runner.answer()
        found = answers.accuracies(runner.items)
        return Score(found["accuracy"], found["accuracy_stderr"], len(answers.right))

    def _cost(self) -> dict[str, float]:
        made = self._meter.count()
        return {"flops": float(made.flops), "kv": float(made.cache)}


def _few(source: Source, at: list[int]) -> Source:
    out = copy.copy(source)
    out.items, out.problems = [source.items[i] for i in at], {}
    return out
