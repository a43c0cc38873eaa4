"""The second part of EarlyTom (arXiv 2605.30010): tokens of the frames that are left, by segments of the tower's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import saliency
from tokenreduce.algorithms.temporal import Temporal, best_of_frames, frames_of
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Identity, Plan, Prune

__all__ = ["EarlyTomTokens"]

#: Digits of a product of shares; what lies behind them is rounding.
_DIGITS = 6


@dataclass(frozen=True)
class EarlyTomTokens(Temporal, needs=("tower",)):
    """What ``earlytom:keep=...`` does behind the projector, see :class:`~tokenreduce.video.encoder.earlytom.EarlyTom`.
    It reads the segments that the tower found (``evidence.segments``), so it has no name to be used alone.

    Args:
        ratio: share of all tokens of the video, those of frames that went included, that stays; in (0, 1].
        method: the method that it is a part of, for messages and traces.
        positions: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    ratio: float = 1.0
    method: str = "earlytom"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", self.method.partition(":")[0])  # for messages

    def spec(self) -> str:
        return self.method

    def tower_blocks(self) -> tuple[Look, ...]:
        return (None,)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        if self.ratio == 1:
            return Identity.like(evidence.x)
        frames, places = frames_of(evidence)
        scores = saliency(evidence, score="received").view(-1, frames, places)
        stay = torch.stack([self.stay(*one) for one in zip(scores, evidence.segments, strict=True)]).flatten(1)
        front = torch.ones(len(stay), evidence.prefix, dtype=torch.bool, device=stay.device)
        stay = torch.cat([front, stay], 1)
        return Identity.like(evidence.x) if bool(stay.all()) else Prune.from_mask(stay)

    def stay(self, scores: Tensor, segment: Tensor) -> Tensor:
        """(T,S) bool, the tokens of one video that stay, by their ``scores`` (T,S) and the ``segment`` (T,) of every
        frame, -1 for one that went."""
        frames, places = scores.shape
        left = (segment >= 0).nonzero().flatten()
        share = round(places * min(self.ratio * frames / len(left), 1.0), _DIGITS)
        mine, rows = segment[left], scores[left]
        ends = torch.ones_like(left, dtype=torch.bool)  # first or last of its segment
        ends[1:-1] = (mine[1:-1] != mine[:-2]) | (mine[1:-1] != mine[2:])
        out = torch.zeros_like(scores, dtype=torch.bool)
        most = torch.full((int(ends.sum()),), math.ceil(share), device=scores.device)
        out[left[ends]] = best_of_frames(rows[ends], most)
        out[left[~ends]] = best_of_windows(rows[~ends], max(1, round(share)))
        return out


def best_of_windows(scores: Tensor, windows: int) -> Tensor:
    """(F,S) bool: the best token, ties to the first, of each of ``windows`` stretches that S tokens are cut into, the
    first S mod windows of which are one longer.

    >>> best_of_windows(torch.tensor([[1.0, 3.0, 3.0, 9.0, 2.0]]), 2).long().tolist()
    [[0, 1, 0, 1, 0]]
    """
    frames, places = scores.shape
    length, longer = divmod(places, windows)
    cut = longer * (length + 1)
    long = scores[:, :cut].reshape(frames, longer, length + 1)
    short = scores[:, cut:].reshape(frames, windows - longer, length)
    starts = torch.arange(windows, device=scores.device) * length
    starts = starts + torch.arange(windows, device=scores.device).clamp(max=longer)
    at = torch.cat([long.argmax(-1), short.argmax(-1)], 1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, at + starts, True)
