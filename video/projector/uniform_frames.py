"""Uniform frames: whole frames at equal distances, whatever the video shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.baseline import regular
from tokenreduce.algorithms.projector import kept
from tokenreduce.algorithms.temporal import Temporal, frame_grid, frames_of
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["UniformFrames"]


@dataclass(frozen=True)
class UniformFrames(Temporal, name="uniform-frames", title="Uniform frames"):
    """Uniform frames: keep as many frames as the budget pays for, at equal distances over the video; raster order.

    Of T frames, M stay: those at floor(i (T-1) / (M-1)), i < M, so that the first and the last are among them; with
    M = 1 the first. This is the baseline of sampling fewer frames, except that the frames went through the vision
    encoder. Places are computed in integers. Where ``keep`` is no multiple of a frame's tokens, the last of the M
    frames is kept in part: tokens at equal distances in it, or a regular sub-grid where there is one, by the rule of
    ``uniform@projector``.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        (t, n), device = frames_of(evidence), evidence.x.device
        frames = -(-keep // n)
        stay = torch.zeros(t, n, dtype=torch.bool, device=device)
        chosen = [i * (t - 1) // max(frames - 1, 1) for i in range(frames)]
        stay[chosen[:-1]] = True
        stay[chosen[-1]] = regular(n, keep - (frames - 1) * n, frame_grid(evidence), device)
        return kept(stay.flatten().nonzero().flatten().expand(evidence.batch, -1), evidence)
