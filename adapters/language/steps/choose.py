"""A language-stage method before its layer, and in prefill what it lets go, where that may come back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tokenreduce.adapters.language.ahead import look_ahead
from tokenreduce.adapters.language.decoders import check_implementation
from tokenreduce.adapters.language.reduce import reduce_before
from tokenreduce.adapters.language.revive import set_aside
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.reducer import Reducer

__all__ = ["Choose", "SetAside"]


@dataclass(frozen=True)
class Choose(LayerStep):
    """In prefill: the plan of ``reducer`` before this layer of ``depth``, from the attention of the layer before or,
    where it looks ahead, of this one (``plain``: before the rotation). ``norm`` is the model's last one."""

    reducer: Reducer
    depth: int
    window: int | None = None
    norm: nn.Module | None = None
    plain: bool = False
    #: The attention that is looked at, where this layer has none.
    seen: nn.Module | None = None

    @property
    def ahead(self) -> bool:
        """Whether the method looks at the attention of this layer itself."""
        return "ahead" in self.reducer.required()

    @property
    def looks(self) -> bool:
        """Whether it asks the attention of this layer."""
        return self.ahead

    def before(self, call: LayerCall) -> None:
        if not call.step.prefill:
            return
        run, index = call.run, call.index
        ahead = self.ahead and index not in run.decided
        with torch.no_grad():
            flash = "flash" in check_implementation(call.layer, index, self.window)
            if ahead:
                seen = look_ahead(call.layer, call.x, run, index, call.kwargs, flash, self.plain)
                if "unrotated" in self.reducer.required():
                    bare = look_ahead(call.layer, call.x, run, index, call.kwargs, flash, plain=True)
                    seen.rotated, seen.queries, seen.keys = (seen.queries, seen.keys), bare.queries, bare.keys  # type: ignore[assignment]
            else:
                seen = run.calls.pop(index - 1, None)  # type: ignore[assignment]
        call.whole = call.x
        call.x = reduce_before(
            call.x, run, index, self.depth, self.reducer, call.layer, seen, self.norm, self.plain, self.seen
        )  # fmt: skip

    def __str__(self) -> str:
        return f"choose ({self.reducer.spec()})"


@dataclass(frozen=True)
class SetAside(LayerStep):
    """In prefill, behind :class:`Choose`: keep the features of what went, for decode steps that bring it back."""

    def before(self, call: LayerCall) -> None:
        cut = call.run.cut_at(call.index)
        if call.step.prefill and call.cache is not None and cut is not None and cut.layer == call.index:
            assert call.whole is not None
            set_aside(call.run, call.index, call.whole, call.tables, call.cache)
