"""Efficient Video Sampling (arXiv 2510.14624): keep the tokens that changed most since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.baseline import regular
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Plan
from tokenreduce.projector import kept, top
from tokenreduce.scoring import finite
from tokenreduce.temporal import Temporal, by_frame, change, frame_grid, frames_of

__all__ = ["EVS"]


@dataclass(frozen=True)
class EVS(Temporal, name="evs", paper="2510.14624", title="EVS, Efficient Video Sampling"):
    """EVS: the first frame whole, then the tokens least similar to those at their place in the frame before.

    The score of a token is 1 - cos of its embedding and the one at the same place one frame earlier, kept or not. One
    budget holds for the whole video, so that a still frame may end without a token. Ties go to the earlier token, and
    equal tokens tie exactly; kept tokens stay in order.

    Decisions: this is the score on embeddings with an exact count, as serving engines have it. The score on pixels that
    the paper is said to use is left out, since evidence between vision encoder and language model holds no pixels. A
    published pruning rate q is ``keep = 1 - q``, there rounded down and never below the first frame; here a ratio is
    rounded half up, and a ``keep`` smaller than a frame leaves tokens of the first frame at equal distances (a regular
    sub-grid where there is one), since all of its scores tie. An all-zero token is at distance 1 from all others. Where
    a model adds features to deeper layers (deepstack), the score is of the main ones alone. The published method is off
    by default; 0.25 is this library's default.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.temporal.Temporal`. Published are original positions, which
            are what ``positions=None`` means on models with M-RoPE.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25

    def choose(self, evidence: Evidence, keep: int) -> Plan:
        t, n = frames_of(evidence)
        x = by_frame(evidence)
        if keep < n:
            first = regular(n, keep, frame_grid(evidence), x.device).nonzero().flatten()
            return kept(first.expand(len(x), -1), evidence)
        score = finite(change(x, [0, *range(t - 1)]), evidence)
        score[:, 0] = float("inf")
        return kept(top(score.flatten(1), keep), evidence)
