"""What a comparison of two generations holds, with and without a reduction, and how its numbers go together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import DecodeStep, Step
from tokenreduce.measure.cached import Thinned
from tokenreduce.measure.question import Question
from tokenreduce.measure.timing import Speedup, Timing

__all__ = ["Comparison", "Side", "Site"]


@dataclass(frozen=True)
class Side:
    """One model on one question.

    Attributes:
        answer, ids: the greedy answer and its tokens, up to the end of sequence.
        encoder: patches at the vision encoder's end over all images and crops, None where they cannot be told.
        layers: visual tokens in every layer of the language model.
        first: seconds until the logits of the first new token: vision encoder and prefill, without preprocessing.
        step: seconds for every further token, None when only one was asked for.
        cache: bytes of keys and values after prefill, over all layers.
        cache_peak: most of them while the prefill ran.
        cache_end: behind the answer.
        flops: of vision encoder and prefill, two per multiply-add; None where they were not counted.
    """

    answer: str
    ids: tuple[int, ...]
    encoder: int | None
    layers: tuple[int, ...]
    first: Timing
    step: Timing | None
    cache: int
    cache_peak: int
    cache_end: int
    flops: int | None = None

    @property
    def mean_tokens(self) -> float:
        """Visual tokens, averaged over the layers of the language model."""
        return sum(self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "answer": self.answer, "ids": list(self.ids), "flops": self.flops, "encoder_tokens": self.encoder,
            "entry_tokens": self.layers[0], "layer_tokens": list(self.layers), "mean_layer_tokens": self.mean_tokens,
            "first_token_s": self.first.median,
            "tokens_per_s": None if self.step is None else 1 / self.step.median, "cache_bytes": self.cache,
            "cache_peak_bytes": self.cache_peak, "cache_end_bytes": self.cache_end,
        }  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Visual tokens ``before`` and ``after`` one place where a method acted; ``layer`` is None before the LLM."""

    stage: str
    layer: int | None
    method: str
    before: int
    after: int

    def __str__(self) -> str:
        return "before the language model" if self.layer is None else f"before layer {self.layer}"


@dataclass(frozen=True)
class Comparison:
    """``stock`` against ``reduced``. ``steps`` are the trace of the reduced prefill, ``decode`` the choices of methods
    that make some for every new token, ``visual`` (L,) marks the columns of the prompt that are visual tokens."""

    question: Question
    reducers: tuple[Reducer, ...]
    stock: Side
    reduced: Side
    sites: tuple[Site, ...]
    rounds: int
    notes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = field(default=(), repr=False)
    visual: Tensor | None = field(default=None, repr=False)
    decode: tuple[DecodeStep, ...] = field(default=(), repr=False)
    #: What methods of the cache stage left.
    cached: tuple[Thinned, ...] = ()

    @property
    def looked(self) -> tuple[tuple[int, str, float, float], ...]:
        """``(layer, method, seen, back)`` for every layer where a method chooses in decode: visual tokens that a new
        token saw from there on, and tokens that came back there, both averaged over the decode steps."""
        names = {r.spec(): label_of(r) for r in self.reducers}
        places = dict.fromkeys((s.layer, s.method) for s in self.decode)
        out = []
        for layer, method in places:
            here = [s for s in self.decode if (s.layer, s.method) == (layer, method)]
            seen = sum(int(s.seen.sum()) for s in here) / len(here)
            out.append((layer, names.get(method, method), seen, sum(int(s.back.sum()) for s in here) / len(here)))
        return tuple(out)

    @property
    def spec(self) -> str:
        """The reducers as text, with the budget that they ran at."""
        return label_of(self.reducers)

    @property
    def agree(self) -> bool:
        """Whether both answers have the same token ids."""
        return self.stock.ids == self.reduced.ids

    @property
    def common(self) -> int:
        """How many token ids are the same before the first that differs."""
        pairs = zip(self.stock.ids, self.reduced.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.stock.ids), len(self.reduced.ids)))

    def ratios(self) -> dict[str, float | None]:
        """Stock over reduced, so that above 1 is less or faster; times are medians of per-round ratios."""
        a, b = self.stock, self.reduced
        pairs = {
            "encoder_tokens": (a.encoder, b.encoder),
            "flops": (a.flops, b.flops),
            "entry_tokens": (a.layers[0], b.layers[0]),
            "mean_layer_tokens": (a.mean_tokens, b.mean_tokens),
            "cache_bytes": (a.cache, b.cache),
            "cache_peak_bytes": (a.cache_peak, b.cache_peak),
            "cache_end_bytes": (a.cache_end, b.cache_end),
        }
        out: dict[str, float | None] = {k: x / y if x is not None and y else None for k, (x, y) in pairs.items()}
        return {**out, **{k: None if v is None else v.ratio for k, v in self.speedups().items()}}

    def speedups(self) -> dict[str, Speedup | None]:
        """The ratios of times with their intervals."""
        a, b = self.stock, self.reduced
        step = None if a.step is None or b.step is None else a.step.against(b.step)
        return {"first_token_s": a.first.against(b.first), "tokens_per_s": step}

    def clock(self) -> dict[str, tuple[float, float] | None]:
        """Seconds without and with the reduction to the first token and for each further one (``step_s``): the stock
        model's median, and that over the speed-up, so that times and ratios never contradict each other."""
        first, step = self.speedups().values()
        assert first is not None
        a, b = self.stock.first.median, None if self.stock.step is None else self.stock.step.median
        return {
            "first_token_s": (a, first.after(a)), "step_s": None if step is None or b is None else (b, step.after(b)),
        }  # fmt: skip

    def _seconds(self, side: int) -> dict[str, float | None]:
        clock = self.clock()
        first, step = clock["first_token_s"], clock["step_s"]
        assert first is not None
        return {"first_token_s": first[side], "tokens_per_s": None if step is None else 1 / step[side]}

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with ``--json``."""
        return {
            "prompt": self.question.prompt, "text": self.question.text, "images": len(self.question.images),
            "reduce": self.spec, "agree": self.agree, "common_tokens": self.common, "rounds": self.rounds,
            "stock": {**self.stock.to_dict(), **self._seconds(0)},
            "reduced": {**self.reduced.to_dict(), **self._seconds(1)}, "ratio": self.ratios(),
            "interval": {k: None if v is None else [v.low, v.high] for k, v in self.speedups().items()},
            "sites": [
                {"stage": s.stage, "layer": s.layer, "method": s.method, "before": s.before, "after": s.after}
                for s in self.sites
            ],
            "decode": [
                {"layer": layer, "method": method, "mean_tokens": seen, "mean_came_back": back}
                for layer, method, seen, back in self.looked
            ],
            "cache": [asdict(one) for one in self.cached],
            "notes": list(self.notes),
        }  # fmt: skip
