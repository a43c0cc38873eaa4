"""Merging whole frames of a video inside a tower that sees them as a batch.

Between blocks the batch gets shorter, and nothing else changes: attention is within a frame. Behind the tower every
frame is there again, merged ones as copies, and :class:`FrameState` knows which are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.state import FRAMES, State
from tokenreduce.core.evidence import FrameEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FrameState", "check_merging_frames", "merge_frames"]


class FrameState(State):
    """The state of frames of which some are left. For every video of the call ``videos`` has a plan on the frames at
    the entry, which leads through those in front of the block that returns this (``before``) and the method's own
    (``here``); ``segments`` (T,) are those of the frames at the entry where a method says them, -1 for one that is not
    left."""

    __slots__ = ("before", "here", "segments", "videos")

    def __init__(self, like: State, before: tuple[Plan, ...], here: tuple[Plan, ...]) -> None:
        super().__init__(like.entry, grid=like.grid)
        self.before, self.here = before, here
        self.segments: tuple[Tensor, ...] | None = None
        self.videos = tuple(one.then(other) for one, other in zip(before, here, strict=True))

    def left(self) -> Tensor:
        """(V,) bool of the frames at the entry that are left."""
        return torch.cat([plan.places()[0] for plan in self.videos])

    def rows(self) -> Tensor:
        """(V,) for every frame at the entry the one among those that are left that it is in, the first of its video
        where it went."""
        starts, out = 0, []
        for plan in self.videos:
            out.append(plan.sources()[0].clamp(min=0) + starts)
            starts += plan.k
        return torch.cat(out)

    def shares(self) -> Tensor | None:
        """(videos,T,T) for every frame at the entry what all of them have in the one that it is in behind the block
        that returns this; frames that were one in front of it already are there as the first of them. None where
        nothing merged here."""
        if all(plan.is_identity for plan in self.here):
            return None
        out = []
        for before, here, whole in zip(self.before, self.here, self.videos, strict=True):
            rows = torch.eye(whole.n, device=here.device)[before.representatives()[0]]
            out.append(whole.expand(here.reduce(rows[None]))[0])
        return torch.stack(out)

    def whole(self, x: Tensor) -> Tensor:
        """Frames that are left (V',N,C) to all (V,N,C): what was merged as copies, the mean frame where one went."""
        out = []
        for plan, mine in zip(self.videos, x.split([plan.k for plan in self.videos]), strict=True):
            flat = mine.flatten(1)[None]
            out.append(plan.expand(flat, flat.mean(1, keepdim=True))[0].view(-1, *x.shape[1:]))
        return torch.cat(out)


# -- at tr.patch -------------------------------------------------------------------------------------------------------
def check_merging_frames(reducers: Sequence[Reducer]) -> None:
    """Raise ``ValueError`` where another method acts in a tower whose frames merge."""
    mine = next((r for r in reducers if r.merges_frames), None)
    if mine is not None and len(reducers) > 1:
        other = next(r for r in reducers if r is not mine)
        raise ValueError(
            f"{mine.spec()} merges whole frames, which {other.spec()} would leave unequal parts of; give the tower one "
            f"of them, and put methods before or inside the language model beside it"
        )


# -- in a forward ------------------------------------------------------------------------------------------------------
def merge_frames(
    reducer: Reducer, x: Tensor, state: State, prefix: int, *, layer: int, depth: int
) -> tuple[Tensor, State]:
    """What ``reducer`` leaves of the frames ``x`` (V,N,C) of the output of block ``layer`` of ``depth``, video by
    video; behind the last block where it acts it is asked for their segments, too."""
    length = FRAMES.get()
    if length == 1 or not len(x):
        return x, state
    places = x.shape[1] - prefix

    def shown(frames: Tensor) -> FrameEvidence:
        patches = frames[:, prefix:].flatten(1)[None]
        return FrameEvidence(patches, places=places, entry=length, layer=layer, depth=depth)

    count = len(state.videos) if isinstance(state, FrameState) else len(x) // length
    before = state.videos if isinstance(state, FrameState) else (Identity(length, 1, x.device),) * count
    rows: list[Tensor] = []
    here: list[Plan] = []
    for mine in x.split([plan.k for plan in before]):
        plan = reducer.plan(shown(mine))
        rows.append(mine if plan.is_identity else plan.reduce(mine.flatten(1)[None])[0].view(-1, *x.shape[1:]))
        here.append(plan)
    last = not any(reducer.acts_at(i, depth) for i in range(layer + 1, depth))
    found = [reducer.frame_segments(shown(left)) for left in rows] if last else []
    known = [s[0] for s in found if s is not None]
    if not known and all(plan.is_identity for plan in here):
        return x, state
    made = FrameState(state, before, tuple(here))
    if known:
        none = torch.full((length,), -1, device=x.device)
        made.segments = tuple(
            none.scatter(0, plan.representatives()[0], own) for plan, own in zip(made.videos, known, strict=True)
        )
    return x if all(plan.is_identity for plan in here) else torch.cat(rows), made
