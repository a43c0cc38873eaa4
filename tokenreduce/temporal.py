"""What methods that look across the frames of a video share: the video as frames, segments, and settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.evidence import Evidence
from tokenreduce.projector import Projector
from tokenreduce.scoring import finite, unit

__all__ = ["Temporal", "adjacent", "by_frame", "frames_of", "segments"]


@dataclass(frozen=True)
class Temporal(Projector):
    """Base of methods that choose among the visual tokens of all frames of a video before the language model.

    :meth:`~tokenreduce.projector.Projector.choose` sees a whole video: T frames (temporal positions, where a family
    joins two frames into one) of n tokens each, frame by frame, raster order inside a frame. Row ends and timestamps
    are not among them. Images are left as they are; on families that take a video as single images, several images of
    one prompt with one view each are the frames of a video.

    Args:
        keep: visual tokens of a whole video that stay, a count or a ratio; None where a method finds the number itself.
        positions, newlines: see :class:`~tokenreduce.projector.Projector`; ``newlines="rank"`` is not possible.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True
    #: Whether the method looks across frames; adapters then give it videos and leave images alone.
    temporal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newlines == "rank":
            raise ValueError(f"{self.name}: newlines='rank' is for methods without frames; use 'keep' or 'drop'")


def frames_of(evidence: Evidence) -> tuple[int, int]:
    """Number of frames T and tokens of a frame n. Raises ``ValueError`` when frames differ in length."""
    t, present = evidence.frames, evidence.n - evidence.prefix
    if t < 1 or present % t:
        raise ValueError(
            f"{present} tokens are not {t} frames of one size: give Evidence(grid=(frames, rows, columns))"
        )
    return t, present // t


def by_frame(evidence: Evidence, x: Tensor | None = None) -> Tensor:
    """(B,T,n,C) float32 embeddings, or another tensor (B,T*n,C) of the tokens behind the prefix, frame by frame.

    Raises ``ValueError`` for NaN (see :func:`tokenreduce.scoring.finite`).
    """
    t, n = frames_of(evidence)
    x = evidence.x[:, evidence.prefix :] if x is None else x
    x = x.detach().float()
    finite(x.sum(-1), evidence)
    return x.reshape(len(x), t, n, -1)


def adjacent(x: Tensor, step: int = 1) -> Tensor:
    """(B,T-step,n) cosine between tokens at the same place ``step`` frames apart, of ``x`` (B,T,n,C)."""
    x = unit(x)
    return (x[:, step:] * x[:, :-step]).sum(-1)


def segments(cuts: Tensor | Sequence[int], frames: int) -> list[tuple[int, int]]:
    """First frame, and first behind the last, of every segment; ``cuts`` are frames t with a cut between t and t+1.

    >>> segments([1, 4], 6), segments([], 3)
    ([(0, 2), (2, 5), (5, 6)], [(0, 3)])
    """
    at = torch.as_tensor(cuts, dtype=torch.long).tolist()
    bounds = [0, *sorted({c + 1 for c in at if 0 <= c < frames - 1}), frames]
    return list(itertools.pairwise(bounds))
