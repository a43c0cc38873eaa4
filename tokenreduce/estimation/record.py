"""One forward of a subject, stock or reduced, as operators of the true model."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenreduce.adapters.language.generation import cache_as
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import record
from tokenreduce.estimation.ops import DECODE, PREFILL, Op
from tokenreduce.estimation.recorder import Recorder
from tokenreduce.estimation.subject import Subject
from tokenreduce.measure.timing import fused_attention
from tokenreduce.patching import patched

__all__ = ["Recorded", "recorded"]


@dataclass(frozen=True)
class Recorded:
    """``ops`` of all parts, of one sample; ``cached`` tokens in the cache of every decoder layer; ``notes`` of the
    reduction."""

    ops: tuple[Op, ...]
    cached: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, part: str) -> list[Op]:
        return [op for op in self.ops if op.part == part]

    def rows(self, part: str) -> dict[int, float]:
        """Rows of the widest matrix product in every layer of ``part``: its tokens."""
        out: dict[int, float] = defaultdict(float)
        for op in self.ops:
            if op.part == part and op.layer >= 0 and op.weights and not op.own:
                out[op.layer] = max(out[op.layer], op.rows)
        return dict(out)

    def tokens(self, part: str) -> float:
        """Mean tokens over the layers of ``part``, 0 where it has none."""
        rows = self.rows(part)
        return sum(rows.values()) / len(rows) if rows else 0.0


def recorded(subject: Subject, reducers: Sequence[Reducer] = ()) -> Recorded:
    """Runs the narrow model once (and one token more). Raises what :func:`tokenreduce.patch` raises for ``reducers``
    that do not fit, and what they raise for the prompt."""
    model, recorder = subject.narrow, Recorder(subject.scale)
    with (
        torch.no_grad(), warnings.catch_warnings(), fused_attention("cpu"),
        patched(model, *_shorter(reducers, subject.share)) if reducers else nullcontext(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        sites = subject.sites(model)
        with record(model, flops=False, own=recorder.own) as trace:
            with recorder.running(sites):
                out = subject.forward(model, subject.inputs)
            cached: tuple[float, ...] = ()
            if subject.answers:
                cached = tuple(float(layer.keys.shape[-2]) for layer in out.layers)
                recorder.prefill = DECODE
                with recorder.running(sites):
                    model(input_ids=subject.token, use_cache=True, **cache_as(model, out))
    made = Recorded(_joined(recorder.ops), cached, tuple(trace.notes))
    return made if subject.share == 1 else _stretched(made, subject)


def _shorter(reducers: Sequence[Reducer], share: float) -> list[Reducer]:
    """Methods whose budget is a count, on a ``share`` of the tokens."""
    out = []
    for r in reducers:
        keep: Any = getattr(r, "keep", None)
        counted = isinstance(keep, int) and not isinstance(keep, bool) and share < 1
        fewer: dict[str, Any] = {"keep": max(1, round(keep * share))} if counted else {}
        out.append(replace(r, **fewer))
    return out


def _joined(ops: Sequence[Op]) -> tuple[Op, ...]:
    """Alike operators as one with a count."""
    found: dict[Op, int] = {}
    for op in ops:
        found[op] = found.get(op, 0) + 1
    return tuple(
        replace(op, flops=op.flops * n, moved=op.moved * n, weights=op.weights * n, count=float(n)) if n > 1 else op
        for op, n in found.items()
    )


def _stretched(made: Recorded, subject: Subject) -> Recorded:
    """What was recorded on a share of a clip, for all of it: visual tokens grow, text does not."""
    grow, text = 1 / subject.share, subject.text

    def factor(tokens: float) -> float:
        visual = max(tokens - text, 0.0)
        return (visual * grow + min(tokens, text)) / tokens if tokens else 1.0

    by_layer = {layer: factor(rows) for layer, rows in made.rows(PREFILL).items()}
    ops = []
    for op in made.ops:
        if op.part == DECODE:
            ops.append(op.shortened(factor(op.inner)) if op.kind == "attention" else op)
        elif op.part == PREFILL and not op.own:
            ops.append(op.shortened(by_layer.get(op.layer, 1.0)))
        elif op.kind == "attention":  # of one frame or window, and there are more of them
            ops.append(replace(op, flops=op.flops * grow, moved=op.moved * grow, count=op.count * grow))
        else:
            ops.append(op.shortened(grow))
    return Recorded(tuple(ops), tuple(n * factor(n) for n in made.cached), made.notes)
