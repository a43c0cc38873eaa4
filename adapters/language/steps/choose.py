"""A language-stage method before its layer, in prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.ahead import look_ahead
from tokenreduce.adapters.language.decoders import check_implementation
from tokenreduce.adapters.language.records import Decided, Recorded
from tokenreduce.adapters.language.reduce import Chooser
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["Choose"]


@dataclass(frozen=True)
class Choose(LayerStep):
    """In prefill: the plan of a method before this layer, from the attention of the layer before or, where it looks
    ahead, of this one. ``window`` is the width of the layer's sliding window, if it has one."""

    rests = True

    chooser: Chooser
    window: int | None = None

    @property
    def listens(self) -> bool:
        """Whether the method looks at the attention of this layer itself."""
        return "ahead" in self.chooser.reducer.required()

    def before(self, call: LayerCall) -> None:
        if not call.prefill:
            return
        with torch.no_grad():
            seen = self._seen(call)
        call.whole = call.x
        call.x = self.chooser.reduce(call.x, call.generation, call.layer, seen)

    def _seen(self, call: LayerCall) -> Call | None:
        """What is seen of an attention."""
        flash = "flash" in check_implementation(call.layer, call.index, self.window)
        if not self.listens or call.index in call.state.of(Decided).layers:
            recorded = call.state.pop(Recorded, call.index - 1)
            return None if recorded is None else recorded.call
        seen = look_ahead(call, flash, self.chooser.plain)
        if "unrotated" in self.chooser.reducer.required():
            bare = look_ahead(call, flash, plain=True)
            seen.rotated, seen.queries, seen.keys = (seen.queries, seen.keys), bare.queries, bare.keys  # type: ignore[assignment]
        return seen

    def __str__(self) -> str:
        return f"choose ({self.chooser.reducer.spec()})"
