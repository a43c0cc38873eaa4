"""PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall with depth."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import candidates
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.vision.cache.snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True)
class PyramidKV(SnapKV, name="pyramidkv", needs=("attention",), paper="2406.02069", title="PyramidKV"):
    """PyramidKV: as SnapKV, where the first layers keep most keys and the last ones fewest, on a straight line.

    How many keys of N real ones a layer keeps, ``w`` being the window:

    - with ``max_capacity_prompt`` C, as the official code counts: b = C - w keys in front of the window on average,
      from max = 2b - b // beta down to min = b // beta, in integer steps (where max reaches N - w, it is that, and min
      is 2b - max), and the window beside them. All keys of prompts shorter than C, C keys of those shorter than 2b. The
      integer step keeps more than C on average: 12 % more with 32 layers, C=64 and N=400.
    - with ``keep`` and ``what="all"``, as kvpress counts: b = N * keep on average, the window among them, from
      max = 2b - b / beta down to min = b / beta, capped at N - w alike, rounded half to even. Where min is below the
      window, every layer keeps b: the fallback, which a warning tells of. That is so for fewer than beta * w kept keys
      unless max is capped.
    - with ``keep`` and ``what="visual"``, the same line over the visual keys, where no window takes part of the budget
      and none falls back. At least one key stays.

    Budgets that fall with depth were reported to harm image models (AirCache, MixKV): a row in tables, no default.

    Args:
        keep, what, window_size, kernel_size, pooling, max_capacity_prompt: see
            :class:`~tokenreduce.vision.cache.snapkv.SnapKV`. Widths of the window in the official code: 64 in its
            class, 32 when made, 8 in its LongBench script; 64 in kvpress.
        beta: steepness, at least 1, where every layer keeps the same.
        gqa_score_agg: how scores of the query heads of a KV head become one, before pooling: "mean", "max" or "sum".
        exact: counts by the largest remainder (ties to the first layers), so that layers together keep what was asked.

    Raises ``ValueError`` for values other than these, and as SnapKV does.
    """

    beta: int = 20
    gqa_score_agg: Literal["mean", "max", "sum"] = "mean"
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.beta, "beta", 1)

    def over_group(self, scores: Tensor) -> Tensor:
        if self.gqa_score_agg == "max":
            return scores.amax(1)
        return scores.sum(1) if self.gqa_score_agg == "sum" else scores.mean(1)

    def wanted(self, evidence: CacheEvidence) -> Tensor:
        among = candidates(evidence, self.what)
        present = among.sum(1).tolist()
        counts = {n: self.counts(n, evidence.depth)[evidence.layer] for n in set(present)}
        return torch.tensor([counts[n] for n in present], device=among.device).unsqueeze(1)

    def counts(self, n: int, depth: int) -> list[int]:
        """How many of ``n`` counted keys each of ``depth`` layers keeps."""
        whole = isinstance(self.keep, float) and self.keep == 1 and self.max_capacity_prompt is None
        if not n or whole:
            return [n] * depth
        return self._official(n, depth) if self.max_capacity_prompt is not None else self._of_share(n, depth)

    def _official(self, n: int, depth: int) -> list[int]:
        capacity, window = self.max_capacity_prompt or 0, self.window_size
        base = capacity - window
        if n < capacity:
            return [n] * depth
        if n < 2 * base or depth == 1:  # the code divides by zero for one layer
            return [capacity] * depth
        low = base // self.beta
        high = 2 * base - low
        if high >= n - window:
            high = n - window
            low = 2 * base - high
        if self.exact:
            return [window + c for c in _shared(high, low, depth)]
        step = (high - low) // (depth - 1)
        return [window + high - layer * step for layer in range(depth)]

    def _of_share(self, n: int, depth: int) -> list[int]:
        base = min(self.keep, n) if isinstance(self.keep, int) else n * self.keep
        window = self.window_size if self.what == "all" else 0
        low = base / self.beta
        high = 2 * base - low
        if high >= n - window:
            high = n - window
            low = 2 * base - high
        if not n >= high >= low >= window:
            warnings.warn(
                "pyramidkv: the last layer's share is below the window, so that every layer keeps the same, as in "
                "kvpress; give a smaller window_size or beta, a larger keep, or max_capacity_prompt",
                stacklevel=2,
            )
            high = low = base
        if self.exact:
            return [max(c, 1) for c in _shared(high, low, depth)]
        step = (high - low) / max(1, depth - 1)
        first = high if depth > 1 else base
        return [min(n, max(1, round(first - layer * step))) for layer in range(depth)]


def _shared(high: float, low: float, depth: int) -> list[int]:
    """Whole numbers on the line from ``high`` to ``low`` over ``depth`` layers, with the rounded sum of the line."""
    middle = (high + low) / 2
    line = [high - layer * (high - low) / (depth - 1) for layer in range(depth)] if depth > 1 else [middle]
    out = [math.floor(x + 1e-9) for x in line]
    rest = math.floor(depth * middle + 0.5 + 1e-9) - sum(out)
    for layer in sorted(range(depth), key=lambda i: (-round(line[i] - out[i], 9), i))[:rest]:
        out[layer] += 1
    return out
