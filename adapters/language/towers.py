"""Encoder-stage methods inside the vision tower of an image/video language model.

What stands between tower and language model (grids, 2x2 merging, tiles, row ends) wants all patches. So the tower runs
on fewer tokens, its output is given all patches back (every merged patch holds the merged token), the model's own code
makes visual tokens of them, and at the entry of the language model those that only repeat a merged token go: a visual
token stays when one of its patches is the place of a token that is left. The saving reaches the language model, and a
method before it chooses among the tokens that are left.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokenreduce.adapters.encoders.frames import FrameState
from tokenreduce.adapters.encoders.joint import JointState, join_frames
from tokenreduce.adapters.encoders.rebuilding import complete, lasting
from tokenreduce.adapters.encoders.state import State, full_plan, known
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import resolve
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["Everything", "attach_encoder", "cell_of", "check_aside", "expand_states", "remaining", "sizes"]


class Everything(Projector):
    """What acts before the language model when only the tower was reduced: it keeps all that is left."""

    whole = True

    def plan(self, evidence: Any) -> Plan:
        return Identity.like(evidence.x)

    def spec(self) -> str:
        return ""


def cell_of(inner: Any, kind: str) -> int:
    """Patches along a side of what becomes one visual token behind a tower, where it is a square of its own: pixel
    shuffle, pooling. 1 elsewhere; packed towers count in such squares by themselves."""
    if kind == "shuffled":
        config = inner.config
        return int(round(1 / config.downsample_ratio) if hasattr(config, "downsample_ratio") else config.scale_factor)
    return int(inner.multi_modal_projector.kernel_size) if kind == "pooled" else 1


def attach_encoder(towers: list[tuple[Any, Tower]], reducers: tuple[Reducer, ...], undo: Undo, cell: int = 1) -> None:
    """Put encoder-stage ``reducers`` into the towers of a language model, where ``cell`` x ``cell`` patches become a
    visual token: methods on pixels drop these together.

    Raises ``ValueError`` for methods that shrink the image: the number of placeholders is the processor's.
    """
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            raise ValueError(
                f"{reducer.name} gives the tower a smaller image, but the prompt has placeholders for all its patches; "
                f"use {reducer.name}@projector, or a smaller image size in the processor"
            )
    together = {getattr(r, "frames", 1) for r in reducers}
    if len(together) > 1:
        raise ValueError(
            f"{' and '.join(r.spec() for r in reducers)} act on different numbers of frames; give both the same frames"
        )
    for adapter, tower in towers:
        adapter.attach(replace(tower, cell=cell), reducers, undo)
        packs = getattr(adapter, "EXPANDS", False)
        if max(together) > 1 and not packs:
            hook = functools.partial(join_frames, frames=max(together), prefix=tower.prefix)
            undo.pre_hook(tower.blocks[0], hook)
        if not packs:
            undo.hook(tower.module, functools.partial(expand_output, prefix=tower.prefix))


def check_aside(vision: Any, reducers: tuple[Reducer, ...]) -> None:
    """Raise ``ValueError`` for a method that looks at a block of the tower ``vision`` which sees what another one did
    not set aside, and no more, and where tokens are set aside, or frames merged, behind what the language model
    gets."""
    inside = [r for r in reducers if r.stage == "encoder" and (r.rebuilds or r.merges_frames)]
    if vision is None or not inside:
        return
    mine: Any = inside[0]
    acting = [i for i in range(vision.depth) if mine.acts_at(i, vision.depth)]
    if acting[-1] > vision.feature:
        raise ValueError(
            f"{mine.spec()} cannot act in block {acting[-1]}: the language model gets what block {vision.feature} of "
            f"the vision tower returns; give it blocks up to {vision.feature}"
        )
    if not mine.rebuilds:
        return
    first = acting[0]
    end = first + mine.as_layer
    for other in reducers:
        seen = [b for look in other.tower_blocks() if (b := resolve(look, vision.depth, vision.feature)) >= end]
        if other.stage != "encoder" and seen:
            raise ValueError(
                f"{other.spec()} looks at block {seen[0]} of the vision tower, which sees only what {mine.spec()} did "
                f"not set aside: blocks before {end} see all patches, so give as_layer={seen[0] + 1 - first} or more, "
                f"or choose a method on embeddings (divprune, dart, fastv)"
            )


def expand_output(tower: Any, args: tuple[Any, ...], output: Any, *, prefix: int) -> Any:
    """Forward hook on a tower: every hidden state gets its patches back."""
    states = getattr(output, "hidden_states", None)
    if states is not None:
        output.hidden_states = tuple(None if h is None else expand_states(h, prefix) for h in states)
    if getattr(output, "last_hidden_state", None) is not None:
        output.last_hidden_state = expand_states(output.last_hidden_state, prefix)
    return output


def expand_states(x: Tensor, prefix: int) -> Tensor:
    """(V,K,C) back to (V,prefix+patches,C): merged patches are copied, dropped ones take the mean of what is left.

    Raises ``RuntimeError`` for tokens that lost what they are.
    """
    state = known(x, "the language model's projector")
    if isinstance(state, FrameState):
        return state.whole(x)
    if state is not None:
        x, state = complete(x, state)
    plan = None if state is None else full_plan(state)
    if plan is None or plan.is_identity:
        return x
    assert state is not None
    lead = state.count * prefix if isinstance(state, JointState) else prefix
    # Dropped patches have no column of their own later; their value only matters where tokens are made of several
    # patches, and zero is nothing that a projector has seen.
    body = x[:, lead:]
    if state.valid is None:
        mean = body.mean(1, keepdim=True)
    else:
        there = state.valid[:, lead:, None].to(x.dtype)
        mean = (body * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    full = plan.expand(x, mean)
    return state.apart(full) if isinstance(state, JointState) else full


def remaining(state: State | None, prefix: int) -> Tensor | None:
    """(V,patches) bool: patches that are the place of a token that is left, None when all are."""
    if isinstance(state, FrameState):
        return state.left()[:, None].expand(-1, state.entry - prefix)
    state = None if state is None else lasting(state)
    plan = None if state is None else full_plan(state)
    if plan is None or plan.is_identity:
        return None
    return _apart(plan.places(), state)[:, prefix:]


def _apart(t: Tensor, state: State | None) -> Tensor:
    """Rows of several frames (G,count*n) to those of single ones (V,n)."""
    return state.apart(t) if isinstance(state, JointState) else t


def sizes(state: State | None, prefix: int) -> Tensor | None:
    """(V,patches) number of patches behind the token of every patch."""
    state = None if state is None else lasting(state)
    plan = None if state is None else full_plan(state)
    if plan is None or state is None or state.size is None:
        return None
    return _apart(plan.expand(state.size.unsqueeze(-1)).squeeze(-1), state)[:, prefix:]
