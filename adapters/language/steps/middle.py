"""A language-stage method between attention and MLP of a layer, and what it left, which enters the next layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenreduce.adapters.language.middle import attach_middle, taken
from tokenreduce.adapters.language.reduce import Chooser
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.undo import Undo

__all__ = ["ChooseInside", "TakeInside"]


@dataclass(frozen=True)
class ChooseInside(LayerStep):
    """The plan of a method that acts before the next layer, inside this one."""

    rests = True

    chooser: Chooser

    def attach(self, layer: Any, undo: Undo) -> None:
        attach_middle(layer, self.chooser, undo)

    def __str__(self) -> str:
        return f"choose inside ({self.chooser.reducer.spec()})"


@dataclass(frozen=True)
class TakeInside(LayerStep):
    """In prefill: what the method inside the layer before left."""

    rests = True

    def before(self, call: LayerCall) -> None:
        if call.prefill and (left := taken(call.generation, call.index)) is not None:
            call.x = left
