"""The training behind the embedded models, by their names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce import zoo
from tokenreduce.zoo import weights

__all__ = ["TRAINABLE", "Trainable", "trainable"]

#: By name: the module that trains it, and what its ``train`` takes besides folder, device and time.
TRAINABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits-vit": ("tokenreduce.zoo.digits", ()),
    "world-vit": ("tokenreduce.zoo.world_vit", ("workers", "compiled")),
    "world-llava": ("tokenreduce.zoo.world_llava", ("workers", "compiled", "encoder")),
    "world-vit-2": ("tokenreduce.zoo.world_vit2", ("workers", "compiled", "start", "stages")),
    "world-llava-2": ("tokenreduce.zoo.world_llava2", ("workers", "encoder", "start", "stages")),
    "world-clip-2": ("tokenreduce.zoo.world_clip2", ("workers", "encoder", "stages")),
}
#: Whose encoder a model looks with, and whose weights it starts from where none are given (nobody's if not here).
ENCODERS = {"world-llava": "world-vit", "world-llava-2": "world-vit-2", "world-clip-2": "world-vit-2"}
STARTS = {"world-vit-2": "world-vit"}


@dataclass(frozen=True)
class Trainable:
    """A model that can be trained again. ``takes`` are the words besides ``device`` and ``minutes`` that :meth:`train`
    takes for it: ``workers`` (processes that make training data), ``compiled`` (through ``torch.compile``), ``encoder``
    (folder of an exported world-vit or world-vit-2), ``start`` (folder of exported weights of this model to go on
    from, :data:`.weights.FOLDER` for the embedded ones), ``stages`` (names of those to go through, instead of all)."""

    name: str
    module: str
    takes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Steps of the whole training, over all stages."""
        return self.steps_of(None)

    def steps_of(self, stages: Sequence[str] | None) -> int:
        """Steps of ``stages``, of all where it is None. Raises ``ValueError`` for a name that is none of them."""
        if stages is None and not hasattr(importlib.import_module(self.module), "STAGES"):
            return int(importlib.import_module(self.module).SCHEDULE.steps)
        return int(sum(s.schedule.steps for s in self._stages(stages)))

    def _stages(self, names: Sequence[str] | None) -> tuple[Any, ...]:
        all_ = importlib.import_module(self.module).STAGES
        known = {s.name: s for s in all_}
        for name in names or ():
            if name not in known:
                raise ValueError(f"{self.name} has no stage {name!r}; its stages: {', '.join(known)}")
        return tuple(all_ if names is None else (known[name] for name in names))

    def recorded(self) -> dict[int, tuple[float, float]]:
        """By step, loss and accuracy that the card of the embedded weights tells of their own training."""
        made = weights.read_card(self.name).get("curve") if self.name in weights.stored() else None
        return {} if not made else {s: (x, y) for s, x, y in zip(*(made[k] for k in _CURVE), strict=True)}

    def train(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        minutes: float | None = None,
        report: Callable[[dict[str, Any]], None] = print,
        **more: Any,
    ) -> nn.Module:
        """Train from scratch, or go on from the checkpoints in ``folder``, and return the model.

        ``report`` gets a row (step, loss, accuracy, minutes) now and then; after ``minutes`` in total training stops.
        Raises ``ValueError`` for words that this model does not take.
        """
        strange = [word for word in more if word not in self.takes]
        if strange:
            raise ValueError(f"{self.name} takes no {strange[0]}; it takes: {', '.join(self.takes) or 'nothing more'}")
        if more.get("stages") is not None:
            more["stages"] = self._stages(more["stages"])
        for word, name in (("encoder", ENCODERS.get(self.name)), ("start", STARTS.get(self.name))):
            given = more.pop(word, None)
            other = name if given is None or word == "encoder" else self.name
            if word in self.takes and other is not None:
                more[word] = zoo.load(other, folder=given or weights.FOLDER).model
        module = importlib.import_module(self.module)
        model: nn.Module = module.train(folder, device=device, stop_after=minutes, report=report, **more)
        return model

    def average(self, model: nn.Module, start: Path, share: float) -> None:
        """Make ``model`` ``share`` of itself and the rest of the weights in the folder ``start``, in place (arXiv
        2109.01903)."""
        earlier = zoo.load(self.name, folder=start).model.state_dict()
        with torch.no_grad():
            for name, weight in model.named_parameters():  # a weight with two names (tied embeddings) comes once
                weight.lerp_(earlier[name].to(weight), 1 - share)


_CURVE = ("step", "loss", "accuracy")


def trainable(name: str) -> Trainable:
    """By name. Raises ``ValueError`` that lists the names for another."""
    if name not in TRAINABLE:
        raise ValueError(f"cannot train {name!r}; trainable models: {', '.join(TRAINABLE)}")
    return Trainable(name, *TRAINABLE[name])
