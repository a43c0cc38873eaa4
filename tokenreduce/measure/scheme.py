"""How many visual tokens every layer of a language model may lose: the fit of ``fitprune``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import keep_chosen, paid_most, question, visual_of
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.patching import patched

__all__ = ["delete_scheme"]


@dataclass
class _Fit:
    """What one pass over the samples does and finds: with ``alpha`` None the totals of the full model, else deletions
    that leave at least the share 1 - alpha of them."""

    alpha: float | None
    totals: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: Layer -> (visual tokens before, deleted) of every sample.
    counts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    batch: int = 0


_NOW: ContextVar[_Fit | None] = ContextVar("tokenreduce_scheme", default=None)


@dataclass(frozen=True)
class _Delete(Reducer, stage="language", needs=("attention", "middle")):
    """Deletes what neither image nor text would miss."""

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer > 0

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual, now = visual_of(evidence), _NOW.get()
        if now is None:
            return keep_chosen(visual, evidence)
        text = question(visual, evidence.valid)
        own = finite(paid_most(evidence, visual), evidence) * visual
        cross = finite(paid_most(evidence, text), evidence) * visual / text.sum(1, keepdim=True).clamp(min=1)
        if now.alpha is None:
            now.totals[now.batch, evidence.layer] = own.sum(1), cross.sum(1)
            return keep_chosen(visual, evidence)
        stay, totals = visual.clone(), now.totals[now.batch, evidence.layer]
        for b in range(evidence.batch):
            where = visual[b].nonzero().flatten()
            gone = torch.ones_like(where, dtype=torch.bool)
            for score, total in zip((own, cross), totals, strict=True):
                gone &= _spare(score[b, where], float(total[b]), now.alpha)
            stay[b, where[gone]] = False
            now.counts.setdefault(evidence.layer - 1, []).append((len(where), int(gone.sum())))
        return keep_chosen(stay, evidence)


def _spare(score: Tensor, total: float, alpha: float) -> Tensor:
    """(n,) bool: the lowest scores that may go while what remains is at least the share 1 - alpha of ``total``, less
    one."""
    order = score.double().argsort(stable=True)
    left = score.double().sum() - score.double()[order].cumsum(0)
    most = int((left >= (1 - alpha) * total).long().cumprod(0).sum()) - 1
    out = torch.zeros_like(score, dtype=torch.bool)
    out[order[: max(min(most, len(score) - 1), 0)]] = True
    return out


def delete_scheme(model: Any, batches: Iterable[Mapping[str, Tensor]], *, ratio: float = 0.6) -> tuple[int, ...]:
    """Visual tokens that every layer deletes, from layer 0 on, so that about the share ``ratio`` of the language
    model's FLOPs is saved: ``tr.FitPrune(deletes=..., tokens=...)``, ``tokens`` being those of an image of ``batches``
    (inputs of ``model``, one image each).

    In every layer the tokens go that are among the lowest by both criteria, attention from the image and from the text,
    while each keeps the share 1 - alpha of its total in the unpruned layer; alpha is found by bisection to 0.01, and
    deletions are means over all samples, rounded down. FLOPs are those of the layers' matrices and attention maps for
    the mean numbers of tokens.

    Raises ``ValueError`` for a ``ratio`` outside (0, 1), and without a batch.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, float) or not 0 < ratio < 1:
        raise ValueError(f"ratio is the share of the FLOPs that is saved, in (0, 1), not {ratio!r}")
    inputs = list(batches)
    if not inputs:
        raise ValueError("there was no batch to fit a scheme on")
    config = model.config.get_text_config()
    depth = int(config.num_hidden_layers)
    start = _pass(model, inputs, _Fit(None))
    low, high, best = 0.0, 1.0, [0] * depth
    while high - low > 0.01:
        middle = (low + high) / 2
        now = _pass(model, inputs, _Fit(middle, start.totals))
        deletes = [sum(d for _, d in now.counts.get(i, [])) // max(len(now.counts.get(i, [])), 1) for i in range(depth)]
        first = now.counts.get(0, [(0, 0)])
        visual = sum(n for n, _ in first) / len(first)
        rest = sum(int(one["attention_mask"].sum()) for one in inputs) / len(first) - visual
        left = [visual - sum(deletes[:i]) for i in range(depth)]
        spent = sum(_flops(config, rest + n) for n in left) / (depth * _flops(config, rest + visual))
        if spent <= 1 - ratio:
            high, best = middle, deletes
        else:
            low = middle
            best = deletes if not any(best) else best
    return tuple(best)


def _pass(model: Any, inputs: list[Mapping[str, Tensor]], now: _Fit) -> _Fit:
    token = _NOW.set(now)
    try:
        with torch.no_grad(), patched(model, _Delete()):
            for now.batch, one in enumerate(inputs):
                model(**one)
    finally:
        _NOW.reset(token)
    return now


def _flops(config: Any, tokens: float) -> float:
    """Of one decoder layer on so many tokens, up to a factor."""
    d, heads = config.hidden_size, config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    matrices = 2 * d * d * (1 + shared / heads) + 3 * d * config.intermediate_size
    return float(tokens * matrices + 2 * tokens * tokens * d)
