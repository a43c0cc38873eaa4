"""The cache stage: two layers store their keys and values together once the upper one has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenreduce.adapters.language.paired import PairedLayer, pair_up
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.cache_codec import CacheCodec
from tokenreduce.core.trace import CacheStep, active

__all__ = ["Pack"]


@dataclass(frozen=True)
class Pack(LayerStep):
    """``method`` on this layer and the ``lower`` one."""

    rests = True

    method: CacheCodec
    lower: int
    ends = True

    def behind(self, call: LayerCall, output: Any) -> Any:
        cache, index = call.cache, call.index
        if not call.prefill or cache is None or isinstance(cache.layers[index], PairedLayer):
            return output
        keys = cache.layers[index].keys
        before = 2 * keys.numel() * keys.element_size()
        held = call.columns.of_cache(index, keys.shape[2])
        there = held.real()[:, 0]
        with torch.no_grad():
            pair_up(self.method, cache, (self.lower, index), None if bool(there.all()) else there)
        trace = active()
        if trace is not None:
            counts = there.sum(1, keepdim=True).expand(-1, keys.shape[1])
            for i in (self.lower, index):
                step = CacheStep(i, 0, self.method.spec(), counts, counts, before, cache.layers[i].nbytes)
                trace.add_cache(call.layer, step)
        return output

    def __str__(self) -> str:
        return f"pack with layer {self.lower} ({self.method.spec()})"
