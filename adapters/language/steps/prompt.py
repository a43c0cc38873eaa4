"""What entered the language model, or the layer before, for methods that look at it in a later layer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.language.records import Decided, LayerInput, PromptFeatures
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["ForgetPrompt", "KeepInput", "KeepPrompt"]


@dataclass(frozen=True)
class KeepPrompt(LayerStep):
    """At layer 0: remember what enters it."""

    rests = True

    def before(self, call: LayerCall) -> None:
        if call.prefill:
            call.state.put(PromptFeatures(call.x.detach()))


@dataclass(frozen=True)
class KeepInput(LayerStep):
    """Remember what enters this layer, for the method that acts before the next one."""

    rests = True

    def before(self, call: LayerCall) -> None:
        if call.prefill and call.index + 1 not in call.state.of(Decided).layers:
            call.state.put(LayerInput(call.x.detach()), call.index)


@dataclass(frozen=True)
class ForgetPrompt(LayerStep):
    """At the last layer that asks for it: a cache lives long, and holds the generation."""

    rests = True

    def before(self, call: LayerCall) -> None:
        if call.prefill:
            call.state.pop(PromptFeatures)
