"""EarlyTom (arXiv 2605.30010), the part inside the vision tower: frames of a segment that repeat each other merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import clean, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers

__all__ = ["EarlyTom", "segments_of", "thinned"]


@dataclass(frozen=True)
class EarlyTom(Reducer, name="earlytom", stage="encoder", position="after", paper="2605.30010", title="EarlyTom"):
    """EarlyTom's merging of frames: behind a few blocks of the tower a video is cut into segments, and of each the
    frames between the first and the last are thinned, so that later blocks see fewer frames.

    The similarity of two frames is the mean over places of the cosine of their tokens. A segment starts where its
    smoothed similarity to the segment's first frame falls below ``tau``, or where it has ``max_window`` - 1 frames. Of
    the frames in between, in time, one that resembles the next more than the segment's ends resemble each other, and
    more than the next resembles its own next, becomes a mean with it, weighted by these two similarities; the last pair
    leaves its first frame. What is left over at the end of a segment goes: the last frame in between always does where
    there are two or more. Segments of one or two frames stay.

    For towers that see the frames of a video as a batch. Visual tokens of a frame that went have no column in the
    prompt; those of a mean stand at its first frame. Images, and videos of one frame, stay as they are. The paper's
    choice of tokens behind the projector is not in here; a method before the language model that looks at embeddings
    chooses among the frames that are left (``earlytom+divprune:keep=0.25``).

    Follows the official code where the paper says otherwise (similarity to the segment's first frame, not to the frame
    before; the last pair is not fused). Different from it: a negative similarity counts as 0 in weights, class tokens
    do not count in similarities, and several videos of a call are merged each by itself.

    Args:
        prune_layers: 0-based blocks behind which frames merge; 6, 21 and 23 in the code's default, tuned per benchmark.
        tau: smoothed similarity below which a new segment starts, in [-1, 1]; 0.3 to 0.8 in published scripts.
        max_window: a segment has fewer frames than this, at least 2.
        ema: weight of a new similarity in the smoothing, in (0, 1].

    Raises ``ValueError`` for values other than these, and for blocks that the tower does not have.
    """

    ragged: ClassVar[bool] = True
    merges_frames: ClassVar[bool] = True

    prune_layers: tuple[int, ...] = (6, 21, 23)
    tau: float = 0.6
    max_window: int = 8
    ema: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.prune_layers, Sequence) and not isinstance(self.prune_layers, str):
            object.__setattr__(self, "prune_layers", tuple(self.prune_layers))
        check_layers(self.prune_layers, "prune_layers")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau is a cosine in [-1, 1], not {self.tau!r}")
        if not 0 < self.ema <= 1:
            raise ValueError(f"ema is a weight in (0, 1], not {self.ema!r}")
        check_count(self.max_window, "max_window", 2)

    def acts_at(self, layer: int, depth: int) -> bool:
        if max(self.prune_layers) >= depth:
            raise ValueError(
                f"prune_layers={self.prune_layers!r}: the tower has blocks 0 to {depth - 1}; give prune_layers among "
                f"them, such as [{max(depth // 4, 0)},{depth - 1}]"
            )
        return layer in self.prune_layers

    def plan(self, evidence: EncoderEvidence) -> Plan:
        """The plan on frames. Raises ``ValueError`` for more than one video, whose frames would differ in number."""
        if evidence.batch != 1:
            raise ValueError(f"{self.name} merges the frames of one video at a time, not of {evidence.batch}")
        places = getattr(evidence, "places", 1)
        frames = unit(clean(evidence.x.detach().float(), evidence)[0].unflatten(-1, (places, -1)))
        weights, into = torch.ones(evidence.n), list(range(evidence.n))
        for start, stop in segments_of(frames, self.tau, self.max_window, self.ema):
            thinned(frames, start, stop, into, weights)
        heads = [i for i, head in enumerate(into) if head == i]
        if len(heads) == evidence.n:
            return Identity.like(evidence.x)
        slot = {head: k for k, head in enumerate(heads)}
        src = [i for i, head in enumerate(into) if head not in (i, -1)]
        dst = [slot[into[i]] for i in src]
        where = evidence.x.device
        keep, source, target = (torch.tensor([t], dtype=torch.long, device=where) for t in (heads, src, dst))
        if not src:
            return Prune(evidence.n, keep)
        return Merge(evidence.n, keep, source, target, weights=weights[None].to(where), by_size=False)


def alike(one: Tensor, other: Tensor) -> float:
    """Mean over places of the cosine of two frames (S,C) of unit vectors."""
    return float((one * other).sum(-1).mean())


def segments_of(frames: Tensor, tau: float, longest: int, ema: float) -> list[tuple[int, int]]:
    """First frame, and first behind the last, of every segment of ``frames`` (T,S,C) of unit vectors."""
    found, start, smoothed = [], 0, 1.0
    for i in range(1, len(frames)):
        smoothed = ema * alike(frames[start], frames[i]) + (1 - ema) * smoothed
        if smoothed < tau or i - start + 1 >= longest:
            found.append((start, i))
            start, smoothed = i, 1.0
    return [*found, (start, len(frames))]


def thinned(frames: Tensor, start: int, stop: int, into: list[int], weights: Tensor) -> None:
    """Write into ``into`` (T,) the frame that every frame of a segment becomes part of, -1 where it goes, and into
    ``weights`` (T,) what it counts there."""
    first, last = start + 1, stop - 1  # those in between, and the first behind them
    m = last - first
    if m < 2:
        return
    merge = alike(frames[start], frames[stop - 1])
    s = [alike(frames[first + i], frames[first + i + 1]) for i in range(m - 1)]
    i, left = 0, set(range(m))
    while i < m - 1:
        end = i == m - 2
        left.discard(i)
        if s[i] > merge and (end or s[i] > s[i + 1]):
            if not end:
                left.discard(i + 1)
                into[first + i + 1] = first + i
                one, two = max(s[i], 0.0), max(s[i + 1], 0.0)
                if one + two > 0:
                    weights[first + i], weights[first + i + 1] = one, two
            i += 2
        else:
            i += 1
    for gone in left:
        into[first + gone] = -1
