"""Similarities above which a vision transformer's tokens merge, so many on average: the thresholds of ``dymu``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokenreduce.algorithms.matching import above, best_edges
from tokenreduce.algorithms.scoring import key_metric
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.schedule import Scheduled
from tokenreduce.patching import patched

__all__ = ["merge_thresholds"]

#: (depth, layer, threshold) of all batches so far.
_FOUND: ContextVar[list[tuple[int, int, float]] | None] = ContextVar("tokenreduce_thresholds", default=None)


@dataclass(frozen=True)
class _Calibrate(Scheduled, needs=("keys",)):
    """Merges the best pairs of a whole batch, as many as its images lose together, and notes the next best."""

    ragged: ClassVar[bool] = True

    prop_attn: bool = True

    def plan(self, evidence: EncoderEvidence) -> Plan:
        best, partner = best_edges(key_metric(evidence), evidence)
        edges = best.flatten().sort(descending=True, stable=True)
        most = int((edges.values > float("-inf")).sum())
        wanted = min(self._removed(evidence.depth)[evidence.layer] * evidence.batch, most)
        # The lowest there is, where nothing is left to be worse than what merges.
        limit = float(edges.values[wanted]) if wanted < most else float(edges.values[most - 1]) if most else 1.0
        found = _FOUND.get()
        if found is not None:
            found.append((evidence.depth, evidence.layer, max(limit, 0.0)))
        joins = torch.zeros_like(best, dtype=torch.bool).flatten().index_fill(0, edges.indices[:wanted], True)
        return above(joins.view_as(best), partner, evidence)


def merge_thresholds(
    model: Any, batches: Iterable[Any], *, r: int | tuple[int, ...], prop_attn: bool = True
) -> tuple[float, ...]:
    """One cosine for every layer of a vision transformer, for ``tr.DyMU(thresholds=...)``: ``r`` pairs per image and
    layer, or a list of such numbers, merge on average above them.

    In every layer the best pairs of a whole batch merge, ``r`` times as many as it has images, so that images lose
    different numbers; the threshold is the next best similarity, at least 0, and the mean of those of all ``batches``
    (inputs of ``model``).

    Raises ``ValueError`` without a batch.
    """
    found: list[tuple[int, int, float]] = []
    token = _FOUND.set(found)
    try:
        with torch.no_grad(), patched(model, _Calibrate(r=r, prop_attn=prop_attn)):
            for batch in batches:
                _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        _FOUND.reset(token)
    if not found:
        raise ValueError("there was no batch to find thresholds on, or r removes nothing")
    means = []
    for layer in range(found[0][0]):
        mine = [limit for _, at, limit in found if at == layer]
        means.append(sum(mine) / len(mine) if mine else 1.0)
    return tuple(means)
