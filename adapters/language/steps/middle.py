"""A language-stage method between attention and MLP of a layer, and what it left, which enters the next layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenreduce.adapters.language.middle import attach_middle, taken
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["ChooseInside", "TakeInside"]


@dataclass(frozen=True)
class ChooseInside(LayerStep):
    """The plan of ``reducer``, which acts before layer ``index`` of ``depth``, inside the layer before that."""

    reducer: Reducer
    index: int
    depth: int
    norm: nn.Module | None = None

    def attach(self, layer: Any, undo: Undo) -> None:
        attach_middle(layer, self.reducer, self.index, self.depth, self.norm, undo)

    def __str__(self) -> str:
        return f"choose inside ({self.reducer.spec()})"


@dataclass(frozen=True)
class TakeInside(LayerStep):
    """In prefill: what the method inside the layer before left."""

    def before(self, call: LayerCall) -> None:
        if call.step.prefill and (left := taken(call.run, call.index)) is not None:
            call.x = left
