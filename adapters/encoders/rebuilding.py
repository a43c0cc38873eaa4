"""Methods that set tokens aside inside a tower and rebuild them behind its last block.

What such a method leaves is a state like any other, so that blocks in between compute on it. Beside it stands
:class:`Aside`, which makes all tokens again: for the attention of blocks that is over all of them, for whatever reads
tokens between two blocks, and behind the last one, from where on it is as if nothing had gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.state import State
from tokenreduce.algorithms.pixels import behind
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Plan, Prune, Rebuild
from tokenreduce.core.reducer import Reducer

__all__ = [
    "Aside",
    "aside_of",
    "check_layers_between",
    "check_rebuilding",
    "complete",
    "lasting",
    "note_entered",
    "shown",
]

_ENTERED = "_tokenreduce_entered"


@dataclass(frozen=True, eq=False)
class Aside:
    """What was set aside in front of a block: the ``plan`` on rows as the method saw them, the same for every sample
    (``left``), the state ``before``, and the block ``until`` which attention is over all tokens. ``joint``: all samples
    were one row."""

    plan: Rebuild
    left: Prune
    before: State
    until: int
    joint: bool = False

    def take(self, x: Tensor) -> Tensor:
        """All tokens (B,N,C) to those that are left (B,K,C)."""
        return self.left.reduce(x)

    def every(self, x: Tensor, layer: int) -> Tensor | None:
        """All tokens, where attention of ``layer`` is over all of them."""
        return self.whole(x) if layer < self.until else None

    def whole(self, x: Tensor) -> Tensor:
        """Those that are left (B,K,C) to all tokens (B,N,C)."""
        if not self.joint:
            return self.plan.rebuild(x)
        valid = self.left.valid
        rows = x.flatten(0, 1) if valid is None else x[valid]
        return self.plan.rebuild(rows[None]).view(len(x), self.left.n, -1)


# -- at tr.patch -------------------------------------------------------------------------------------------------------
def check_rebuilding(reducers: Sequence[Reducer], depth: int) -> None:
    """Raise ``ValueError`` where another method in the tower acts on tokens that one sets aside, or from the block on
    whose change it looks at; and for one across frames."""
    mine = next((r for r in reducers if r.rebuilds), None)
    if mine is None:
        return
    first = next(i for i in range(depth) if mine.acts_at(i, depth))
    for other in (r for r in reducers if r is not mine):
        if getattr(other, "frames", 1) > 1:
            raise ValueError(
                f"{mine.spec()} sets single tokens aside, and {other.spec()} takes frames together; leave frames out"
            )
        acting = [i for i in range(max(first - 1, 0), depth) if other.acting_position() != "input" and
                  (other.rebuilds or other.acts_at(i, depth))]  # fmt: skip
        if acting:
            raise ValueError(
                f"{mine.spec()} rebuilds what it drops from what enters block {first}, after the change in block "
                f"{first - 1}; {other.spec()} acts in block {acting[0]}, where these tokens would be missed: give it "
                f"blocks before {first - 1}, or a method before or inside the language model"
            )


# -- in a forward ------------------------------------------------------------------------------------------------------
def note_entered(out: Tensor, entered: Tensor) -> None:
    """Leave what went into a block on what it returns, for the method in front of the next one."""
    setattr(out, _ENTERED, entered)


def entered_of(x: Tensor) -> Tensor:
    """What went into the block that returned ``x``. Raises ``RuntimeError`` where it is gone."""
    found: Tensor | None = getattr(x, _ENTERED, None)
    if found is None:
        raise RuntimeError(
            "what entered the block before did not reach this one: something between the blocks makes new tensors "
            "(reentrant checkpointing, FSDP, a custom loop). Use non-reentrant checkpointing, patch before wrapping, "
            "and run patched blocks in order."
        )
    return found


def shown(reducer: Any, x: Tensor, state: State, prefix: int, **known: Any) -> EncoderEvidence:
    """Evidence of tokens (B,N,C): every sample a row, or all of them one where the method chooses among all."""
    before = entered_of(x)
    if not _joint(reducer, x):
        known |= {"size": state.size, "valid": state.valid, "protected": prefix, "entry": state.entry}
        return EncoderEvidence(x, before=before, grid=state.full_grid(prefix), **known)

    def row(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.flatten(0, 1)[None]

    fixed: Any = 0
    if prefix:
        fixed = row((torch.arange(x.shape[1], device=x.device) < prefix).expand(len(x), -1))
    known |= {"size": row(state.size), "valid": row(state.valid), "protected": fixed, "entry": state.entry * len(x)}
    return EncoderEvidence(row(x), before=row(before), **known)  # type: ignore[arg-type]


def _joint(reducer: Any, x: Tensor) -> bool:
    return bool(reducer.per == "all" and len(x) > 1)


def aside_of(reducer: Any, plan: Plan, x: Tensor, state: State, prefix: int, layer: int) -> Aside:
    """What ``plan`` sets aside of ``x`` (B,N,C). Raises ``TypeError`` for a plan of another kind."""
    if not isinstance(plan, Rebuild):
        raise TypeError(f"{reducer.name} sets tokens aside, so its plan is a Rebuild, not a {type(plan).__name__}")
    until = layer + reducer.as_layer
    if not _joint(reducer, x):
        return Aside(plan, plan.choice(), state, until)
    left = behind(Prune.from_mask(plan.places().view(len(x), -1)[:, prefix:]), prefix)
    return Aside(plan, left, state, until, joint=True)


def lasting(state: State) -> State:
    """The state of all tokens, which is theirs behind the tower."""
    return state if state.aside is None else state.aside.before


def check_layers_between(states: Sequence[State], layers: Sequence[int], normed: bool, final: bool) -> None:
    """Raise ``ValueError`` for features of ``layers`` behind the tower's norm where tokens are set aside, which are
    rebuilt in front of it, and for ``final`` ones of a tower that stopped there."""
    odd = [i for i in layers if normed and states[i].aside is not None]
    if odd or (final and states[-1].aside is not None):
        raise ValueError(
            f"tokens are set aside behind block {odd[0] if odd else len(states) - 1}, and can only be rebuilt in front "
            "of the tower's norm: ask for features without norm and without stopping early, or call tr.unpatch first"
        )


def complete(x: Tensor, state: State) -> tuple[Tensor, State]:
    """All tokens and their state, where some were set aside; else the same."""
    aside: Aside | None = state.aside
    return (x, state) if aside is None else (aside.whole(x), aside.before)
