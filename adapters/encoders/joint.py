"""Merging across the frames of a video inside a vision tower that sees one frame at a time.

The frames of a video are rows of the tower's batch. A method with ``frames=g`` sees g consecutive frames of a video as
one row, the protected tokens of all frames first. Until it does something the tower runs as it is; from its first plan
on the tokens of g frames stay in one row, so that norms, projections and MLPs run on what is left of all of them.

Attention stays that of single frames. A merged token attends in the frame of its representative, and every frame that
has a part in it sees it as a key, under proportional attention with the logarithm of that part. This is what the
unpatched tower computes when, behind every attention, the tokens that were merged all take the value of their
representative: exact, and without any token that a frame would miss. Behind the tower every frame gets all its patches
back, the merged ones as copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Attended
from tokenreduce.adapters.encoders.block import View
from tokenreduce.adapters.encoders.site import Site
from tokenreduce.adapters.encoders.state import FRAMES, State, entry_of, power_of, set_state, state_of
from tokenreduce.core.plan import Plan

__all__ = ["FRAMES", "JointState", "Windows", "check_frames", "join_frames"]


class Windows:
    """Which tokens of rows (G,K) attend in each of g frames, and which they see there.

    ``queries`` and ``keys`` (G*g,Q) and (G*g,M) are indices into the row, padded; ``there`` (G*g,Q) marks real queries,
    ``bias`` (G*g,1,1,M) is added to the logits.
    """

    def __init__(self, queries: Tensor, there: Tensor, keys: Tensor, bias: Tensor, tokens: int) -> None:
        self.queries, self.there, self.keys, self.bias, self.tokens = queries, there, keys, bias, tokens

    def attend(self, compute: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(G,H,K,d) each to (G,K,H,d); ``compute(q, k, v, mask)`` is stock attention, (B,H,N,d) each to (B,N,H,d)."""
        rows = len(q)
        out = compute(_take(q, self.queries), _take(k, self.keys), _take(v, self.keys), self.bias.to(q.dtype))[0]
        index = self.queries.masked_fill(~self.there, self.tokens).reshape(rows, -1, 1, 1)
        out = out.reshape(rows, index.shape[1], *out.shape[2:])
        full = out.new_zeros(rows, self.tokens + 1, *out.shape[2:])
        return full.scatter(1, index.expand_as(out), out)[:, :-1]


def _take(t: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (G*g,M) of ``t`` (G,H,K,d) to (G*g,H,M,d)."""
    (g, h, _, d), m = t.shape, index.shape[1]
    out = t.gather(2, index.reshape(g, 1, -1, 1).expand(-1, h, -1, d))
    return out.view(g, h, -1, m, d).transpose(1, 2).reshape(-1, h, m, d)


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mask (R,K) the indices of marked places, in order and padded to the most of a row, and which are real."""
    most = max(int(mask.sum(1).max()), 1)
    index = (~mask).long().argsort(dim=1, stable=True)[:, :most]
    return index, mask.gather(1, index)


class JointState(State):
    """The state of ``count`` frames in a row, with ``prefix`` protected tokens each; ``entry`` is that of a frame.

    While no plan has acted, frames are rows of their own. Then ``shares`` (G,count,K) are the sizes that every frame
    has in every token.
    """

    __slots__ = ("_windows", "count", "prefix", "shares")

    def __init__(self, entry: int, count: int, prefix: int, shares: Tensor | None = None, **known: Any) -> None:
        super().__init__(entry, **known)
        self.count, self.prefix, self.shares = count, prefix, shares
        self._windows: Windows | None = None

    def patches(self, x: Tensor, prefix: int) -> int:
        return super().patches(x, prefix if self.shares is None else self.count * self.prefix)

    # -- rows of frames, and of single frames -----------------------------------------------------------------------
    def row(self, x: Tensor) -> Tensor:
        """(V,n,...) of single frames to (V/count,count*n,...), protected tokens of all frames first."""
        x = x.unflatten(0, (-1, self.count))
        return torch.cat([x[:, :, : self.prefix].flatten(1, 2), x[:, :, self.prefix :].flatten(1, 2)], 1)

    def apart(self, x: Tensor) -> Tensor:
        """The way back."""
        lead = self.count * self.prefix
        head, body = x[:, :lead].unflatten(1, (self.count, -1)) if lead else None, x[:, lead:]
        body = body.unflatten(1, (self.count, -1))
        return (body if head is None else torch.cat([head, body], 2)).flatten(0, 1)

    def seen(self, got: Attended) -> Attended:
        """Queries, keys and values (V,H,n,d) of single frames for rows of them."""

        def heads(t: Tensor | None) -> Tensor | None:
            return None if t is None else self.row(t.transpose(1, 2)).transpose(1, 2)

        return Attended(got.out, heads(got.queries), heads(got.keys), heads(got.values))

    def site(self, site: Site) -> Site:
        return replace(site, prefix=self.count * site.prefix, cls=False)

    # -- what frames have in tokens ---------------------------------------------------------------------------------
    def _places(self, device: torch.device) -> Tensor:
        """(count*entry,) frame of every token of a row at the entry."""
        frame = torch.arange(self.count, device=device)
        body = self.entry - self.prefix
        return torch.cat([frame.repeat_interleave(self.prefix), frame.repeat_interleave(body)])

    def _shares(self, rows: int, device: torch.device) -> Tensor:
        if self.shares is not None:
            return self.shares
        own = self._places(device) == torch.arange(self.count, device=device)[:, None]
        return own.float().expand(rows, -1, -1)

    def after(self, plan: Plan, proportional: float, size: Tensor | None = None) -> JointState:
        left = super().after(plan, proportional, size)
        each = torch.arange(plan.batch, device=plan.device).repeat_interleave(self.count)
        before = self._shares(plan.batch, plan.device).flatten(0, 1)
        shares = plan.rows_at(each).reduce_size(before)
        assert shares is not None
        return JointState(
            self.entry, self.count, self.prefix, shares.unflatten(0, (plan.batch, self.count)), size=left.size,
            valid=left.valid, origin=left.origin, acted=left.acted, proportional=left.proportional, grid=left.grid,
        )  # fmt: skip

    def _weights(self, shares: Tensor) -> Tensor:
        """What to add to the logits of keys of which frames have ``shares``."""
        return power_of(shares.log(), self.proportional)

    def home(self) -> Tensor:
        """(G,K) frame of every token: that of its representative."""
        assert self.origin is not None
        return self._places(self.origin.device)[self.origin]

    def bias(self, dtype: torch.dtype) -> Any:
        """None while frames are rows of their own, then :class:`Windows`."""
        if self.acted is None:
            return None
        if self._windows is None:
            assert self.shares is not None
            asks = self.home()[:, None] == torch.arange(self.count, device=self.shares.device)[:, None]
            if self.valid is not None:
                asks = asks & self.valid[:, None]
            queries, there = _packed(asks.flatten(0, 1))
            shares = self.shares.flatten(0, 1)
            keys, _ = _packed(shares > 0)
            bias = self._weights(shares.gather(1, keys))
            # A frame of which nothing is left attends to nothing; its row must still be finite.
            bias = torch.where((bias == float("-inf")).all(1, keepdim=True), 0.0, bias)
            self._windows = Windows(queries, there, keys, bias[:, None, None], asks.shape[2])
        return self._windows

    def view(self, x: Tensor, attention: bool) -> View:
        """What rows of ``x`` see: where ``attention`` is asked for, what their frame sees. The mask has the sizes."""
        grid, frame_mask = self.full_grid(self.prefix), None
        if attention:
            rows, device = x.shape[0], x.device
            shares = self._shares(rows, device)
            home = self.home() if self.acted is not None else self._places(device).expand(rows, -1)
            seen = shares.gather(1, home.unsqueeze(-1).expand(-1, -1, shares.shape[2]))
            mask = self._weights(seen)
            if self.valid is not None:  # rows of slots that are not there must not be empty
                mask = torch.where(self.valid.unsqueeze(-1), mask, 0.0)
            frame_mask = mask.unsqueeze(1)
        return View(self.count * self.entry, None if grid is None else (self.count, *grid), False, frame_mask)


def join_frames(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, frames: int, prefix: int) -> None:
    """Pre-hook on a tower's first block: mark that rows of a video are frames, ``frames`` of which belong together.

    Raises ``ValueError`` for videos that cannot be cut into so many frames each.
    """
    x, length = args[0], FRAMES.get()
    if length == 1 or state_of(x) is not None:  # activation checkpointing replays with the same tensor
        return
    entry = entry_of(x)
    grid = None if entry is None else entry.grid
    set_state(x, JointState(x.shape[1], check_frames(frames, length), prefix, grid=grid))


def check_frames(frames: int, length: int, what: str = "frames") -> int:
    """How many of a video's ``length`` frames belong together: ``frames``, or all of a shorter one. Raises
    ``ValueError`` for videos that cannot be cut into so many each."""
    if frames < length and length % frames:
        fits = [g for g in range(2, length + 1) if length % g == 0]
        raise ValueError(
            f"a video of {length} {what} cannot be cut into groups of frames={frames}; give frames one of "
            f"{', '.join(map(str, fits))}, or sample a multiple of {frames} frames"
        )
    return min(frames, length)
