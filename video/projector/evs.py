"""Efficient Video Sampling (arXiv 2510.14624): keep the tokens that changed most since the frame before."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import regular
from tokenreduce.algorithms.projector import kept, top
from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.temporal import Temporal, by_frame, change, frame_grid, frames_of
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["EVS"]


@dataclass(frozen=True)
class EVS(Temporal, name="evs", paper="2510.14624", title="EVS, Efficient Video Sampling"):
    """EVS: the first frame whole, then the tokens least similar to those at their place in the frame before.

    The score of a token is 1 - cos of its embedding and the one at the same place one frame earlier, kept or not. One
    budget holds for the whole video, so that a still frame may end without a token. Ties go to the earlier token, and
    equal tokens tie exactly; kept tokens stay in order.

    Decisions: by default this is the score on embeddings with an exact count, as serving engines have it.
    ``score="pixels"``, which the paper is said to use, is the L1 distance between the pixels of a token's area and
    those there one frame earlier, as the processor normalises them, here with the same exact count. Where a family
    joins two frames into one position, both are compared with both; where tokens are pooled patches, theirs is the
    mean, weighted like the pooling.

    A published pruning rate q is ``keep = 1 - q``, there rounded down and never below the first frame; here a ratio is
    rounded half up, and a ``keep`` smaller than a frame leaves tokens of the first frame at equal distances (a regular
    sub-grid where there is one), since all of its scores tie. An all-zero token is at distance 1 from all others. Where
    a model adds features to deeper layers (deepstack), the score is of the main ones alone. The published method is off
    by default; 0.25 is this library's default.

    Args:
        score: what is compared: "features", the embeddings that enter the language model, or "pixels".
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`. Published are original
            positions, which are what ``positions=None`` means on models with M-RoPE.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25
    score: str = "features"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("features", "pixels"):
            raise ValueError(f"score is 'features' or 'pixels', not {self.score!r}")

    def required(self) -> tuple[str, ...]:
        return ("pixels",) if self.score == "pixels" else ()

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        t, n = frames_of(evidence)
        x = by_frame(evidence)
        if keep < n:
            first = regular(n, keep, frame_grid(evidence), x.device).nonzero().flatten()
            return kept(first.expand(len(x), -1), evidence)
        if self.score == "pixels":
            score = evidence.of_pixels(moved).view(len(x), t, n)
        else:
            score = change(x, [0, *range(t - 1)])
        score = finite(score, evidence)
        score[:, 0] = float("inf")
        return kept(top(score.flatten(1), keep), evidence)


def moved(pixels: Tensor) -> Tensor:
    """(B,T,n) float32 mean absolute difference of ``pixels`` (B,T,n,P) from the frame before, 0 in the first."""
    first = torch.zeros_like(pixels[:, 0, :, 0], dtype=torch.float32)
    steps = [(b.float() - a.float()).abs().mean(-1) for a, b in itertools.pairwise(pixels.unbind(1))]
    return torch.stack([first, *steps], 1)
