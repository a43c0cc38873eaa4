"""A model by name as an estimate needs it: its true shapes, and a narrow one of the same layers that can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokenreduce.estimation.recorder import Sites
from tokenreduce.estimation.scale import Heads, Scale

__all__ = ["Ask", "Subject", "heads_of_blocks"]


@dataclass(frozen=True)
class Ask:
    """What a model is to be asked: an image of ``image`` (width, height) pixels, None for the model's own size, or a
    clip of ``frames`` of this size; ``prompt`` text tokens around it."""

    image: tuple[int, int] | None = None
    frames: int | None = None
    prompt: int = 64


@dataclass
class Subject:
    """``narrow`` runs and is patched; ``scale`` reads its shapes as those of the true model, which has ``parameters``.

    ``forward(model, inputs)`` is one prefill of one sample (it gives the cache), or one forward of an encoder, with
    ``visual`` tokens among ``text`` ones; ``build`` makes the true model with random weights. ``share`` is below 1
    where a clip was too long to be tried: the narrow model sees this share of the visual tokens. ``keys`` are the true
    (heads, width) of cached keys.
    """

    name: str
    title: str
    narrow: nn.Module
    scale: Scale
    parameters: int
    inputs: dict[str, Tensor]
    forward: Callable[[nn.Module, dict[str, Tensor]], Any]
    build: Callable[[], nn.Module]
    sites: Callable[[nn.Module], Sites]
    shown: str
    visual: int = 0
    text: int = 0
    share: float = 1.0
    keys: tuple[int, int] | None = None
    token: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def answers(self) -> bool:
        """Whether there is a language model."""
        return self.keys is not None


def heads_of_blocks(narrow: int, width: int, true: int, true_width: int) -> tuple[Heads, Heads]:
    """(narrow, true) heads of a tower by their number and width."""
    return Heads(narrow, narrow, width), Heads(true, true, true_width)
