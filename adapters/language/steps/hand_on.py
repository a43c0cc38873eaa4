"""Layers that do not hand their keywords on to their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenreduce.adapters.language.decoders import hand_over, take_up
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.undo import Undo

__all__ = ["HandOn"]


@dataclass(frozen=True)
class HandOn(LayerStep):
    """The last step of such a layer: keep our keywords for its attention, which takes them up."""

    def before(self, call: LayerCall) -> None:
        hand_over(call.kwargs)

    def attach(self, layer: Any, undo: Undo) -> None:
        undo.pre_hook(layer.self_attn, take_up)
