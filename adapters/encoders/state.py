"""What travels with the tokens of one activation tensor: sizes, positions, plans so far, and the grid at the entry.

Everything is an attribute of the tensor, so nothing about a forward is stored on a module. The price: whatever makes a
new tensor (``clone``, ``detach``, ``cat``, indexing, another dtype) loses it. Blocks, norms and poolings of a patched
tower hand it on, and where sizes are needed and gone, :func:`lost` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.core.plan import Plan

__all__ = [
    "COLLECTING", "FRAMES", "Acted", "Entry", "State", "carry_state", "collect_states", "collected", "entry_of",
    "expand_patches", "full_plan", "known", "log_size", "lost", "note_entry", "pool_mean", "power_of", "set_state",
    "state_of",
]  # fmt: skip

_ON_TENSOR = "_tokenreduce_state"
_AT_ENTRY = "_tokenreduce_entry"
Grid = tuple[int, ...]
#: Number of frames of each video that is on its way through a tower; 1 outside of videos.
FRAMES: ContextVar[int] = ContextVar("tokenreduce_frames", default=1)
#: The list that blocks add their states to, where somebody asked for them (:func:`collect_states`).
COLLECTING: ContextVar[list[State] | None] = ContextVar("tokenreduce_states", default=None)


class Entry(NamedTuple):
    """Marks tokens before the first block: the grid of patches of *this* forward, None where they fill none, and the
    :class:`~tokenreduce.adapters.encoders.pixels.Pixels` that they are made of, where a tower shows them."""

    grid: Grid | None = None
    pixels: Any = None


def power_of(log: Tensor, power: float) -> Tensor:
    """``log`` sizes as a bias on logits, where sizes count to a ``power``; what has none stays at -inf."""
    if power == 1:
        return log
    return log * power if power else torch.zeros_like(log).masked_fill(log == float("-inf"), float("-inf"))


class Acted(NamedTuple):
    """The last ``plan`` of a tower so far, and what acted ``earlier``: a chain, so that code compiled for one block
    does not depend on how many acted before it."""

    plan: Plan
    earlier: Any  # Acted | None

    def all(self) -> tuple[Plan, ...]:
        """All plans, the first one first."""
        out: list[Plan] = []
        here: Acted | None = self
        while here is not None:
            out.append(here.plan)
            here = here.earlier
        return tuple(reversed(out))


class State:
    """What is known about the tokens of one activation tensor (B,N,C). Never changed in place.

    ``grid`` is that of the patches at the entry of this forward, (rows, columns) or (frames, rows, columns);
    ``proportional`` the power of their sizes by which keys count, 0 where they do not. ``aside`` is what a method set
    aside of them (:class:`~tokenreduce.adapters.encoders.rebuilding.Aside`), None for nothing.
    """

    __slots__ = ("_before", "_origin", "acted", "aside", "entry", "grid", "proportional", "size", "valid")

    def __init__(
        self,
        entry: int,
        size: Tensor | None = None,
        valid: Tensor | None = None,
        origin: Tensor | None = None,
        acted: Acted | None = None,
        proportional: float = False,
        grid: Grid | None = None,
    ) -> None:
        self.entry = entry
        self.size = size
        self.valid = valid
        self._origin = origin
        self._before: State | None = None  # the state in front of the last plan, until somebody asks for the origin
        self.acted = acted
        self.proportional = proportional
        self.grid = grid
        self.aside: Any = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans so far, the first one first."""
        return () if self.acted is None else self.acted.all()

    @property
    def origin(self) -> Tensor | None:
        """(B,N) number of the token at the entry in whose place each one is; None where none has left. Few ask."""
        before = self._before
        if before is not None:
            assert self.acted is not None
            plan, earlier = self.acted.plan, before.origin
            self._origin = plan.representatives() if earlier is None else plan.gather(earlier)
            self._before = None
        return self._origin

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B,1,1,N) to add to attention logits: log size where it counts, -inf for slots that are not there."""
        if self.size is None or not (self.proportional or self.valid is not None):
            return None
        rows = (-1, 1, 1, self.size.shape[1])
        bias = self.size.float().view(rows).log()
        if self.proportional != 1:
            bias = power_of(bias, self.proportional)
        if self.valid is not None:
            bias = bias.masked_fill(~self.valid.view(rows), float("-inf"))
            if self.aside is not None:  # what nothing is left of attends to nothing; its row must still be finite
                bias = torch.where(self.valid.any(1).view(-1, 1, 1, 1), bias, 0.0)
        return bias if bias.dtype == dtype else bias.to(dtype)

    def patches(self, x: Tensor, prefix: int) -> int:
        """How many of the tokens ``x`` (B,N,C) are there and not protected, over all rows."""
        if self.valid is not None:
            return int(self.valid[:, prefix:].sum())
        return x.shape[0] * (x.shape[1] - prefix)

    def full_grid(self, prefix: int) -> Grid | None:
        """:attr:`grid` where the tokens at the entry filled it behind ``prefix`` tokens, else None (patch dropout,
        masked patches)."""
        return self.grid if self.grid is not None and self.entry == prefix + math.prod(self.grid) else None

    def after(self, plan: Plan, proportional: float, size: Tensor | None = None) -> State:
        """The state of the tokens that ``plan`` leaves; ``size`` are theirs where they are known already."""
        valid = plan.validity()
        size = plan.reduce_size(self.size) if size is None else size
        if self.valid is not None and size is not None:
            # What joins the slot of a padded token fills it; looking at the slot's own token would lose it.
            valid = size > 0
        if size is None and valid is not None:
            size = valid.float()
        proportional = proportional or self.proportional
        state = State(self.entry, size, valid, None, Acted(plan, self.acted), proportional, self.grid)
        state._before = self
        return state


# -- on the tensor -----------------------------------------------------------------------------------------------------
def state_of(x: Tensor) -> State | None:
    """The state that a patched block left on its output, or None."""
    return getattr(x, _ON_TENSOR, None)


def set_state(x: Tensor, state: State | None) -> Tensor:
    if state is not None:
        setattr(x, _ON_TENSOR, state)
    return x


def entry_of(x: Tensor) -> Entry | None:
    """The mark of tokens that no block has seen, or None."""
    return getattr(x, _AT_ENTRY, None)


def note_entry(x: Tensor, entry: Entry | None) -> Tensor:
    """Mark ``x`` as tokens before the first block."""
    if entry is not None:
        setattr(x, _AT_ENTRY, entry)
    return x


def carry_state(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook for norms before the first and behind the last block: what follows still knows the tokens."""
    if isinstance(output, Tensor):
        note_entry(set_state(output, state_of(args[0])), entry_of(args[0]))


def lost(what: str) -> RuntimeError:
    """The error of ``what`` (a pooling, a head) that needs token sizes and gets a tensor without them."""
    return RuntimeError(
        f"{what} of a patched model needs the sizes of merged tokens, and this tensor of features has lost them: they "
        "travel on the tensor that the model's blocks return, and clone, detach, indexing, cat, a change of dtype or "
        "device, and hooks that return a new tensor leave them behind. Give it that tensor itself (change dtype and "
        "device of the model or of the pooled output instead), or call tr.unpatch first for features of an unpatched "
        "model"
    )


def known(x: Tensor, what: str) -> State | None:
    """The state of ``x``, None for tokens before the first block. Raises ``RuntimeError`` where it got :func:`lost`."""
    state = state_of(x)
    if state is None and entry_of(x) is None:
        raise lost(what)
    return state


# -- all plans at once -------------------------------------------------------------------------------------------------
def full_plan(state: State) -> Plan | None:
    """All plans so far as one, from the tokens at the entry to those that are left; None when none acted."""
    composed: Plan | None = None
    for plan in state.plans:
        composed = plan if composed is None else composed.then(plan)
    return composed


def expand_patches(patches: Tensor, state: State, prefix: int) -> Tensor:
    """Patch tokens (B,K-prefix,C) back to (B,N-prefix,C): merged tokens are copied, dropped ones are zero, those that
    were set aside are rebuilt."""
    if state.aside is not None:
        head = patches.new_zeros(patches.shape[0], prefix, patches.shape[2])
        patches, state = state.aside.whole(torch.cat([head, patches], 1))[:, prefix:], state.aside.before
    plan = full_plan(state)
    if plan is None or plan.k < plan.n == patches.shape[1] + prefix:  # all there, or made whole behind the last block
        return patches
    head = patches.new_zeros(patches.shape[0], prefix, patches.shape[2])
    return plan.expand(torch.cat([head, patches], 1))[:, prefix:]


# -- pooling -----------------------------------------------------------------------------------------------------------
def pool_mean(x: Tensor, size: Tensor) -> Tensor:
    """Mean over tokens (B,K,C) to (B,C), each counted ``size`` (B,K) times; half precision is summed in float32."""
    w = size.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)
    return ((x * w).sum(1) / w.sum(1)).to(x.dtype)


def log_size(state: State, skip: int, dtype: torch.dtype) -> Tensor:
    """(B,K-skip) log sizes, -inf for slots that are not there: a key bias for attention pooling."""
    assert state.size is not None
    bias = state.size.float().log()
    if state.valid is not None:
        bias = bias.masked_fill(~state.valid, float("-inf"))
    return bias[:, skip:].to(dtype)


# -- states of every layer, for dense outputs ------------------------------------------------------------------------
def collected() -> list[State] | None:
    """:data:`COLLECTING`, None in compiled code."""
    return None if torch.compiler.is_compiling() else COLLECTING.get()


@contextmanager
def collect_states() -> Iterator[list[State]]:
    """The state after every block that runs inside, in order."""
    states: list[State] = []
    token = COLLECTING.set(states)
    try:
        yield states
    finally:
        COLLECTING.reset(token)
