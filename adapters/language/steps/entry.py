"""What a prompt enters the decoder layers with: its cache, and at layer 0 the columns that were left before it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.language.cache import keep_generation
from tokenreduce.adapters.language.generation import generation_of
from tokenreduce.adapters.language.rotary import rows_of
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["OwnCache", "TakeEntry"]


@dataclass(frozen=True)
class OwnCache(LayerStep):
    """At the first layer with steps: the cache belongs to this generation from now on."""

    rests = True

    def before(self, call: LayerCall) -> None:
        if call.prefill and call.cache is not None and generation_of(call.cache) is not call.generation:
            keep_generation(call.cache, call.generation)


@dataclass(frozen=True)
class TakeEntry(LayerStep):
    """At layer 0: the hidden states of the columns that a method before the language model left."""

    rests = True

    def before(self, call: LayerCall) -> None:
        cut = call.columns.cut_at(-1)
        if call.prefill and cut is not None:
            call.x = rows_of(call.x, cut.local.at)
