"""EarlyTom (arXiv 2605.30010): frames of a segment that repeat each other merge inside the vision tower, and behind it
tokens of the frames that are left are chosen by the segments."""

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
from tokenreduce.video.projector.earlytom_tokens import EarlyTomTokens

__all__ = ["EarlyTom", "segments_of", "thinned"]


@dataclass(frozen=True)
class EarlyTom(Reducer, name="earlytom", stage="encoder", position="after", paper="2605.30010", title="EarlyTom"):
    """EarlyTom: behind a few blocks of the tower a video is cut into segments, and of each the frames between the first
    and the last are thinned, so that later blocks see fewer frames; with ``keep``, a share of their tokens enters the
    language model.

    The similarity of two frames is the mean over places of the cosine of their tokens. A segment starts where its
    smoothed similarity to the segment's first frame falls below ``tau``, or where it has ``max_window`` - 1 frames. Of
    the frames in between, in time, one that resembles the next more than the segment's ends resemble each other, and
    more than the next resembles its own next, becomes a mean with it, weighted by these two similarities; the last pair
    leaves its first frame. What is left over at the end of a segment goes: the last frame in between always does where
    there are two or more. Segments of one or two frames stay.

    Behind the projector, the frames that the last of these blocks left are cut into segments by the same rule, on what
    it left of them. With S tokens of a frame and r' = min(``keep`` T / T', 1), where T' of T frames are left, the first
    and last frame of a segment keep the ceil(S r') tokens with the most attention, and frames between them one token
    each of max(1, round(S r')) stretches of the raster line, that with the most attention (the first stretches are one
    longer where S does not divide). Attention is what a token receives from all of its frame in the block whose output
    enters the projector, mean over heads, pooled as the model pools features; where that block merges frames, theirs is
    merged with the same weights. Tokens stay in order, with compact positions, and row ends stay.

    For towers that see the frames of a video as a batch. Visual tokens of a frame that went have no column in the
    prompt; those of a mean stand at its first frame. Images stay as they are, and so do videos of one frame but for
    ``keep``. Without it, another method before the language model may choose among the frames that are left
    (``earlytom+divprune:keep=0.25``). HoliTom's merge inside the language model, an option of the paper, is
    ``earlytom:keep=0.1+holitom-merge``.

    Follows the official code where the paper says otherwise (similarity to the segment's first frame, not to the frame
    before; the last pair is not fused; dynamic frames have no clusters). Different from it: a negative similarity
    counts as 0 in weights, class tokens do not count in similarities, several videos of a call are merged each by
    itself, ties of attention go to the lower index, and S r' is rounded but for the rounding of the product.

    Args:
        prune_layers: 0-based blocks behind which frames merge; 6, 21 and 23 in the code's default, tuned per benchmark.
        tau: smoothed similarity below which a new segment starts, in [-1, 1]; 0.3 to 0.8 in published scripts.
        max_window: a segment has fewer frames than this, at least 2.
        ema: weight of a new similarity in the smoothing, in (0, 1].
        keep: share of the video's tokens that enters the language model, in (0, 1]; 0.1 in the code's default, 0.1 to
            0.25 in the paper. What is left is near it, not exactly it: counts are rounded up or to the nearest frame by
            frame, every frame that is left keeps one at least, and there are no more than frames left to choose from.
            None leaves all tokens of these frames, and 1.0 everything: no frames merge then.
        positions: with ``keep``, what the language model counts, "compact" or "original"; see
            :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, for a count as ``keep`` (no count can be promised), and for
    blocks that the tower does not have.
    """

    ragged: ClassVar[bool] = True
    merges_frames: ClassVar[bool] = True

    prune_layers: tuple[int, ...] = (6, 21, 23)
    tau: float = 0.6
    max_window: int = 8
    ema: float = 0.9
    keep: float | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prune_layers, Sequence) and not isinstance(self.prune_layers, str):
            object.__setattr__(self, "prune_layers", tuple(self.prune_layers))
        check_layers(self.prune_layers, "prune_layers")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau is a cosine in [-1, 1], not {self.tau!r}")
        if not 0 < self.ema <= 1:
            raise ValueError(f"ema is a weight in (0, 1], not {self.ema!r}")
        check_count(self.max_window, "max_window", 2)
        if self.keep is not None and (not isinstance(self.keep, float) or not 0 < self.keep <= 1):
            raise ValueError(
                f"keep is a share of a video's tokens (float in (0, 1]) or None, not {self.keep!r}: how many are left "
                f"depends on the frames that merge"
            )
        if self.positions is not None:
            if self.keep is None:
                raise ValueError("positions are those behind a choice of tokens: give keep, too, or leave it out")
            self._tokens()

    def acts_at(self, layer: int, depth: int) -> bool:
        if max(self.prune_layers) >= depth:
            raise ValueError(
                f"prune_layers={self.prune_layers!r}: the tower has blocks 0 to {depth - 1}; give prune_layers among "
                f"them, such as [{max(depth // 4, 0)},{depth - 1}]"
            )
        return layer in self.prune_layers

    def parts(self) -> tuple[Reducer, ...]:
        return (self,) if self.keep is None else (self, self._tokens())

    def _tokens(self) -> EarlyTomTokens:
        assert self.keep is not None
        return EarlyTomTokens(ratio=self.keep, positions=self.positions, method=self.spec())

    def frame_segments(self, evidence: EncoderEvidence) -> Tensor | None:
        """(1,T) the segments of the frames that are left, None where no tokens are chosen by them."""
        if self.keep is None or self.keep == 1:
            return None
        out = torch.empty(1, evidence.n, dtype=torch.long)
        for i, (start, stop) in enumerate(segments_of(_frames(evidence), self.tau, self.max_window, self.ema)):
            out[0, start:stop] = i
        return out.to(evidence.x.device)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        """The plan on frames. Raises ``ValueError`` for more than one video, whose frames would differ in number."""
        if evidence.batch != 1:
            raise ValueError(f"{self.name} merges the frames of one video at a time, not of {evidence.batch}")
        if self.keep == 1:
            return Identity.like(evidence.x)
        frames = _frames(evidence)
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


def _frames(evidence: EncoderEvidence) -> Tensor:
    """(T,S,C) the tokens of every frame of a video, of unit length."""
    places = getattr(evidence, "places", 1)
    return unit(clean(evidence.x.detach().float(), evidence)[0].unflatten(-1, (places, -1)))


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
