"""What the vision tower of an image/video language model saw: the object that travels from there to the entry of the
language model."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.frames import FrameState
from tokenreduce.adapters.encoders.packed import Packed
from tokenreduce.adapters.encoders.rebuilding import lasting
from tokenreduce.adapters.encoders.state import State, full_plan
from tokenreduce.adapters.language.families import Vision
from tokenreduce.adapters.language.towers import remaining, sizes
from tokenreduce.core.evidence import Attention, BaseEvidence, Origin, PoolingHead
from tokenreduce.core.plan import Plan

__all__ = ["ARRIVING", "WATCHING", "Encoded", "Entry", "PackedCall", "encoded_in", "put_on"]

_ON_OUTPUT = "_tokenreduce_encoded"
#: What the call of get_image_features that is under way has seen so far.
WATCHING: ContextVar[Encoded | None] = ContextVar("tokenreduce_watching", default=None)
#: Where get_image_features leaves what it saw for the forward that called it.
ARRIVING: ContextVar[dict[str, Encoded] | None] = ContextVar("tokenreduce_arriving", default=None)


@dataclass
class Entry:
    """One image (or tile, or video): where its tokens come from, its first view, and its rows among what entered the
    projector, None where tokens have no such row of their own."""

    origin: Origin
    first: int
    rows: Tensor | None = None


@dataclass
class Encoded:
    """What a call of ``get_image_features`` or ``get_video_features`` saw."""

    vision: Vision
    blocks: tuple[int, ...]
    calls: dict[int, Any] = field(default_factory=dict)
    #: (views,n,C) what entered the projector.
    features: Tensor | None = None
    #: What entered the module that makes tokens, where a method asked for it.
    entered: Tensor | None = None
    #: (views,C) class-token features.
    own: Tensor | None = None
    entries: list[Entry] = field(default_factory=list)
    #: Packed towers: first patch and number of patches of every view.
    spans: list[tuple[int, int]] = field(default_factory=list)
    tower_kwargs: dict[str, Any] = field(default_factory=dict)
    #: After every block, where a method acts in the tower.
    states: list[Any] = field(default_factory=list)
    #: Besides the blocks: "pixels", "head".
    wanted: tuple[str, ...] = ()
    #: What the tower was given.
    given: Tensor | None = None
    #: Side of a patch.
    patch: int = 1
    pooled: PoolingHead | None = None

    def pixels(self, views: Tensor) -> Tensor:
        """(V,patches,P) of ``views`` (V,), which all have as many patches: the pixels of each."""
        assert self.given is not None
        if self.vision.kind == "packed":  # several frames in one
            start = torch.tensor([self.spans[v][0] for v in views.tolist()], device=self.given.device)
            return self.given[start[:, None] + torch.arange(self.spans[int(views[0])][1], device=self.given.device)]
        s = self.patch
        pixels = self.given[views.to(self.given.device)]
        h, w = pixels.shape[-2] // s, pixels.shape[-1] // s  # a convolution leaves out what no patch fits in
        pixels = pixels[..., : h * s, : w * s].reshape(len(views), -1, h, s, w, s)
        return pixels.permute(0, 2, 4, 1, 3, 5).reshape(len(views), h * w, -1)

    @property
    def reduced(self) -> State | Packed | None:
        """The tokens that enter the projector, None when all patches do."""
        state = self.states[self.vision.feature] if len(self.states) > self.vision.feature else None
        if isinstance(state, Packed):
            return None if state.lasting.at is None else state.lasting
        state = None if state is None else lasting(state)
        return state if state is not None and (state.plans or isinstance(state, FrameState)) else None

    def left(self, views: Tensor) -> Tensor | None:
        """(V,patches) bool of ``views`` (V,), which all have as many patches: those that are the place of a token that
        a method in the tower left; None when all are."""
        state = self.reduced
        if isinstance(state, Packed):
            return state.left(views)
        left = remaining(state, int(self.vision.cls))
        return None if left is None else left[views]

    def sizes(self, views: Tensor) -> Tensor | None:
        """(V,patches) how many tokens of the tower's entry are in the one that every patch of ``views`` (V,) is in;
        None when each is one."""
        state = self.reduced
        if isinstance(state, Packed):
            return state.sizes(views)
        number = sizes(state, int(self.vision.cls))
        return None if number is None else number[views]

    def _at(self, block: int, tokens: int) -> State | None:
        """The tokens that the attention of ``block`` saw; methods act before or behind it."""
        for state in (self.states[block - 1] if block and self.states else None, *self.states[block : block + 1]):
            state = None if state is None else lasting(state)  # no look at a block that sees what was not set aside
            if state is not None and state.plans and full_plan(state).k == tokens:  # type: ignore[union-attr]
                return state
        return None

    @property
    def tokens(self) -> int:
        return sum(e.origin.n for e in self.entries)

    def evidence(self, block: int, views: Tensor) -> BaseEvidence:
        """Evidence of a tower block for ``views`` (V,), which all have as many patches."""
        call = self.calls[block]
        if self.vision.kind == "packed":
            return call.evidence(block, [self.spans[v] for v in views.tolist()], views, self.vision.depth)
        q, k = (call.queries, call.keys) if call.rotated is None else call.rotated
        state = self._at(block, k.shape[2])

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[views]

        frames = self._frames(block)  # of those that are left in front of the block
        at = views if frames is None else frames.rows().to(views.device)[views]
        q, k = (t.detach().index_select(0, at.to(t.device)) for t in (q, k))
        return _of_patches(
            Attention(
                q, k, size=None if state is None else rows(state.size), cls=self.vision.cls,
                valid=None if state is None else rows(state.valid),
                proportional=state is not None and state.proportional,
            ),
            block, self.vision.depth, int(self.vision.cls),
        )  # fmt: skip

    def _frames(self, block: int) -> FrameState | None:
        """The frames that are left in front of ``block``, None where all are."""
        state = self.states[block - 1] if block and len(self.states) >= block else None
        return state if isinstance(state, FrameState) else None

    def shares(self, block: int, views: Tensor) -> Tensor | None:
        """(videos,T,T) of whole videos ``views`` (V,), see :meth:`FrameState.shares`, of frames that ``block`` merged;
        None where it merged none."""
        state = self.states[block] if len(self.states) > block else None
        if not isinstance(state, FrameState) or state is self._frames(block):
            return None
        shares = state.shares()
        return None if shares is None else shares[(views[:: shares.shape[1]] // shares.shape[1]).to(shares.device)]

    def segments(self, views: Tensor) -> Tensor | None:
        """(videos,T) segments of the frames of whole videos ``views`` (V,), -1 for those that went; None where no
        method in the tower says them."""
        state = self.reduced
        if not isinstance(state, FrameState) or state.segments is None:
            return None
        known, frames = torch.cat(state.segments), len(state.segments[0])
        return None if len(views) % frames else known[views.to(known.device)].view(-1, frames)

    def plan_at(self, block: int, views: Tensor) -> Plan | None:
        """The plan from the patches at the tower's entry to those that ``block`` saw, None when they are all there."""
        call = self.calls[block]
        if isinstance(call, PackedCall):
            return None if call.packed is None else call.packed.patches(views)[2]
        if not self.states:
            return None
        state = self._at(block, call.keys.shape[2])
        plan = None if state is None else full_plan(state)
        return None if plan is None else plan.rows_at(views)


@dataclass
class PackedCall:
    """Queries and keys of a Qwen tower's block, packed over images and frames, in the order of the merger's output;
    of the tower where a method acts in there, which ``packed`` then describes."""

    queries: Tensor  # (H,P,d) behind RoPE
    keys: Tensor
    #: (P,) window of every patch, None where a frame is one window.
    window: Tensor | None
    packed: Packed | None = None

    def evidence(self, block: int, spans: list[tuple[int, int]], views: Tensor, depth: int) -> BaseEvidence:
        """Evidence on the patches of ``views`` (V,), each with its first patch and number of patches in ``spans``."""
        state = None
        if self.packed is None:
            where = torch.tensor([s for s, _ in spans], device=self.keys.device)[:, None]
            where = where + torch.arange(spans[0][1], device=self.keys.device)
        else:
            where, state, _ = self.packed.patches(views)
        q, k = (t[:, where].transpose(0, 1) for t in (self.queries, self.keys))
        valid = None if state is None else state.valid
        mask = None
        if self.window is not None:
            w = self.window[where]
            mask = (w[:, :, None] == w[:, None, :])[:, None]
            if valid is not None:  # rows of slots that are not there must not be empty
                mask = mask | ~valid[:, None, :, None]
        return _of_patches(
            Attention(
                q, k, mask=mask, cls=False, rope="post", size=None if state is None else state.size, valid=valid,
                proportional=state is not None and state.proportional,
            ),
            block, depth, 0,
        )  # fmt: skip


def _of_patches(seen: Attention, block: int, depth: int, prefix: int) -> BaseEvidence:
    """Evidence of a tower's ``block`` whose attention was ``seen``; keys stand for the features, which nobody kept."""
    return BaseEvidence(
        seen.keys.transpose(1, 2).flatten(2), seen, size=seen.size, valid=seen.valid, protected=prefix, cls=seen.cls,
        layer=block, depth=depth,
    )  # fmt: skip


def encoded_in(output: Any) -> Encoded | None:
    """What the wrapper left on an output of ``get_image_features``."""
    return getattr(output, _ON_OUTPUT, None)


def put_on(output: Any, seen: Encoded) -> None:
    setattr(output, _ON_OUTPUT, seen)
