"""Merging whole frames of a video inside a tower that sees them as a batch.

Between blocks the batch gets shorter, and nothing else changes: attention is within a frame. Behind the tower every
frame is there again, merged ones as copies, and :class:`FrameState` knows which are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.state import FRAMES, State
from tokenreduce.core.evidence import FrameEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FrameState", "check_merging_frames", "merge_frames"]


class FrameState(State):
    """The state of frames of which some are left: a plan on the frames at the entry for every video of the call."""

    __slots__ = ("videos",)

    def __init__(self, like: State, videos: tuple[Plan, ...]) -> None:
        super().__init__(like.entry, grid=like.grid)
        self.videos = videos

    def left(self) -> Tensor:
        """(V,) bool of the frames at the entry that are left."""
        return torch.cat([plan.places()[0] for plan in self.videos])

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
def merge_frames(reducer: Reducer, x: Tensor, state: State, prefix: int, **known: Any) -> tuple[Tensor, State]:
    """What ``reducer`` leaves of the frames ``x`` (V,N,C) of a block's output, video by video."""
    length = FRAMES.get()
    if length == 1 or not len(x):
        return x, state
    videos = state.videos if isinstance(state, FrameState) else (None,) * (len(x) // length)
    rows: list[Tensor] = []
    plans: list[Plan] = []
    for before, mine in zip(videos, x.split([length if p is None else p.k for p in videos]), strict=True):
        patches = mine[:, prefix:].flatten(1)[None]
        plan = reducer.plan(FrameEvidence(patches, places=mine.shape[1] - prefix, entry=length, **known))
        rows.append(plan.reduce(mine.flatten(1)[None])[0].view(-1, *mine.shape[1:]))
        plans.append(plan if before is None else before.then(plan))
    if all(plan.is_identity for plan in plans):
        return x, state
    plans = [Identity(length, 1, x.device) if plan.is_identity else plan for plan in plans]
    return torch.cat(rows), FrameState(state, tuple(plans))
