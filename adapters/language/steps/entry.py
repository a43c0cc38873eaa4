"""What a prompt enters the decoder layers with: its cache, and at layer 0 the columns that were left before it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.language.cache import keep_run
from tokenreduce.adapters.language.generation import rows_of, run_of
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["OwnCache", "TakeEntry"]


@dataclass(frozen=True)
class OwnCache(LayerStep):
    """At the first layer with steps: the cache belongs to this run from now on."""

    def before(self, call: LayerCall) -> None:
        if call.step.prefill and call.cache is not None and run_of(call.cache) is not call.run:
            keep_run(call.cache, call.run)


@dataclass(frozen=True)
class TakeEntry(LayerStep):
    """At layer 0: the hidden states of the columns that a method before the language model left."""

    def before(self, call: LayerCall) -> None:
        cut = call.run.cut_at(-1)
        if call.step.prefill and cut is not None:
            call.x = rows_of(call.x, cut.local)
