"""What methods that look across the frames of a video share: the video as frames, segments, and settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.scoring import clean, descending, unit
from tokenreduce.core.evidence import ImageEvidence, VisualEvidence
from tokenreduce.core.plan import Mix, Plan

__all__ = [
    "Temporal", "adjacent", "best_of_frames", "by_frame", "change", "cut_by_similarity", "frame_grid", "frames_of",
    "joined", "segments",
]  # fmt: skip


@dataclass(frozen=True)
class Temporal(Projector):
    """Base of methods that choose among the visual tokens of all frames of a video before the language model.

    :meth:`~tokenreduce.algorithms.projector.Projector.choose` sees a whole video: T frames (temporal positions, where a
    family joins two frames into one) of n tokens each, frame by frame, raster order inside a frame. Row ends and
    timestamps are not among them. Images are left as they are; on families that take a video as single images, several
    images of one prompt with one view each are the frames of a video.

    Args:
        keep: visual tokens of a whole video that stay, a count or a ratio; None where a method finds the number itself.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`; ``newlines="rank"`` is not
            possible.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True
    #: Whether the method looks across frames; adapters then give it videos and leave images alone.
    temporal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newlines == "rank":
            raise ValueError(f"{self.name}: newlines='rank' is for methods without frames; use 'keep' or 'drop'")

    def plan(self, evidence: VisualEvidence) -> Plan:
        if evidence.masked or evidence.valid is not None:
            raise ValueError(
                f"{self.name} takes whole frames of one size: protect leading tokens by their number, give no mask of "
                f"single ones, and give samples of different length one by one"
            )
        return super().plan(evidence)


def frames_of(evidence: VisualEvidence) -> tuple[int, int]:
    """Number of frames T and tokens of a frame n. Raises ``ValueError`` when frames differ in length."""
    t, present = evidence.frames, evidence.n - evidence.prefix
    if t < 1 or present % t:
        raise ValueError(
            f"{present} tokens are not {t} frames of one size: give Evidence(grid=(frames, rows, columns))"
        )
    return t, present // t


def by_frame(evidence: VisualEvidence, x: Tensor | None = None) -> Tensor:
    """(B,T,n,C) float32 embeddings, or another tensor (B,T*n,C) of the tokens behind the prefix, frame by frame.

    Raises ``ValueError`` for NaN (see :func:`tokenreduce.algorithms.scoring.clean`).
    """
    t, n = frames_of(evidence)
    x = evidence.x[:, evidence.prefix :] if x is None else x
    x = clean(x.detach().float(), evidence)
    return x.reshape(len(x), t, n, -1)


def adjacent(x: Tensor, step: int = 1) -> Tensor:
    """(B,T-step,n) cosine between tokens at the same place ``step`` frames apart, of ``x`` (B,T,n,C)."""
    x = unit(x)
    return (x[:, step:] * x[:, :-step]).sum(-1)


def change(x: Tensor, reference: Sequence[int]) -> Tensor:
    """(B,T,n) cosine distance 1 - cos of every token of ``x`` (B,T,n,C) from the one at its place in frame
    ``reference[t]``; 1 where one of them is all zero.

    Half the squared distance of unit vectors: exactly 0 for equal tokens, so that still places tie, and no digits lost
    for those nearly equal.
    """
    u = unit(x)
    some = (u != 0).any(-1).float() / 2
    return torch.stack(
        [(u[:, t] - u[:, r]).square().sum(-1) / 2 + (1 - some[:, t] - some[:, r]) for t, r in enumerate(reference)], 1
    )


def best_of_frames(score: Tensor, quota: Tensor) -> Tensor:
    """(B,T,n) bool: the ``quota`` (T,) or (B,T) tokens of every frame with the highest ``score`` (B,T,n), ties to the
    lower index."""
    return descending(score).argsort(dim=-1) < quota.unsqueeze(-1)


def frame_grid(evidence: VisualEvidence) -> tuple[int, int] | None:
    """(rows, columns) that the tokens of a frame fill in raster order, or None where they fill none."""
    if not isinstance(evidence, ImageEvidence) and evidence.grid is None:
        return None
    rows, columns = evidence.shape
    return (rows, columns) if rows * columns == frames_of(evidence)[1] else None


def segments(cuts: Tensor | Sequence[int], frames: int) -> list[tuple[int, int]]:
    """First frame, and first behind the last, of every segment; ``cuts`` are frames t with a cut between t and t+1.

    >>> segments([1, 4], 6), segments([], 3)
    ([(0, 2), (2, 5), (5, 6)], [(0, 3)])
    """
    at = torch.as_tensor(cuts, dtype=torch.long).tolist()
    bounds = [0, *sorted({c + 1 for c in at if 0 <= c < frames - 1}), frames]
    return list(itertools.pairwise(bounds))


def cut_by_similarity(similarity: Tensor, threshold: float, least: int) -> list[tuple[int, int]]:
    """Segments (first frame, first behind the last) of T frames, from similarities (T-1,) of adjacent frames.

    There is a cut wherever two frames are less similar than ``threshold`` and, while that leaves fewer than ``least``
    segments, between the least similar frames that are left, ties to the earlier; never more segments than frames.

    >>> cut_by_similarity(torch.tensor([0.95, 0.5, 0.9, 0.9]), 0.8, 3)
    [(0, 2), (2, 3), (3, 5)]
    """
    below = similarity < threshold
    wanted = max(int(below.sum()), min(least - 1, len(similarity)))
    # The lowest are the ones below the threshold, and then the lowest of the rest.
    return segments(descending(-similarity)[:wanted], len(similarity) + 1)


def joined(evidence: VisualEvidence, samples: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Mix:
    """The plan in which every token behind the prefix belongs to one output or to none; the prefix stays in front.

    ``samples`` are ``(head (N,), weight (N,), rank (N,) or None)`` of every sample, counted behind the prefix: the
    token that a token's output is built around (for that token itself its own index; -1 where it is dropped), its
    weight there, and the order of the outputs by the ranks of their heads; None is the order of the heads.
    """
    p, out = evidence.prefix, []
    for head, weight, rank in samples:
        own = torch.arange(len(head), device=head.device)
        keep = (head == own).nonzero().flatten()
        if rank is not None:
            keep = keep[rank[keep].argsort(stable=True)]
        slot = torch.full_like(head, -1)
        slot[keep] = p + own[: len(keep)]
        src = (head >= 0).nonzero().flatten()
        front = torch.arange(p, device=head.device)
        dst, shares = torch.cat([front, slot[head[src]]]), torch.cat([weight.new_ones(p), weight[src]])
        out.append((torch.cat([front, p + keep]), torch.cat([front, p + src]), dst, shares))
    return Mix.from_samples(evidence.n, out)
