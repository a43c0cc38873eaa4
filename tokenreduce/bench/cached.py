"""The cache task: bytes of keys and values against long answers, on questions about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tokenreduce.bench.asking.forced import Forced
from tokenreduce.bench.task import Axis
from tokenreduce.bench.vlm import VlmTask
from tokenreduce.core.flops import gmacs
from tokenreduce.core.reducer import Reducer
from tokenreduce.patching import patched

__all__ = ["CacheTask"]


@dataclass
class CacheTask(VlmTask):
    """Methods of the cache stage on one image language model: what the cache holds, and what is said from it.

    Budgets are shares of the bytes of keys and values that are held behind the prefill. The score is how many tokens of
    the unreduced model's own answers of ``answer_tokens`` tokens a model would have said, each behind the same ones
    before it (``forced_agreement``), with their ``perplexity``. Answers of one token are no measure here: they come
    before anything has left the cache.
    """

    stages: tuple[str, ...] = ("cache",)
    answer_tokens: int = 24
    against: str = "kv"

    metric: ClassVar[str] = "forced_agreement"
    baselines: ClassVar[tuple[str, ...]] = ("random@cache", "recent")
    well_known: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **VlmTask.well_known, "cache": ("snapkv", "h2o", "knorm", "keydiff", "adakv", "vl-cache", "look-m"),
    }  # fmt: skip
    probed: ClassVar[int] = 16
    measured: ClassVar[tuple[str, ...]] = ("cache",)
    axes: ClassVar[Mapping[str, Axis]] = {
        "kv": Axis("kv_share", "KV bytes", "bytes of keys and values behind the prefill, % of the unreduced model's")
    }

    _forced: Forced | None = field(default=None, init=False, repr=False)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "answer_tokens": self.answer_tokens}

    @property
    def forced(self) -> Forced:
        """The unreduced model's long answers."""
        if self._forced is None:
            self._forced = Forced(self.runner, self.meter.probes, self.answer_tokens)
        return self._forced

    def spent(self, reducers: Sequence[Reducer]) -> float:
        """Bytes of the cache behind the prefill, mean over the probes."""
        return self.meter.cost(tuple(reducers)).cache

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row: ``cache_bytes`` and ``kv_share``, ``forced_agreement``, ``perplexity``, ``flops`` and times."""
        reducers, meter = tuple(reducers), self.meter
        cost, dense = meter.cost(reducers), meter.cost(())
        with patched(self.loaded.model, *reducers) if reducers else nullcontext():
            scores = self.forced.score(self.loaded.model)
            times = type(self).clock(meter, bool(reducers), self.repeats) if self.repeats else {}
        return {
            "cache_bytes": cost.cache, "kv_share": cost.cache / dense.cache, **scores, "flops": cost.flops,
            "gmacs": gmacs(cost.flops), "questions": len(meter.probes), "visual_tokens": cost.layers[0],
            "mean_visual_tokens": sum(cost.layers) / len(cost.layers), **times,
            "notes": list(dict.fromkeys(cost.notes)),
        }  # fmt: skip
