"""What all encoder adapters share: the state that travels with the tokens, and the block that reduces them.

How it works. A patched block's class is swapped for a subclass that mixes in :class:`Reduced` and says how its family
computes the attention half and the MLP half. Between them the site hands evidence to the reducer and applies its
plan. Sizes, positions and the plans so far live in a :class:`State` attached to the activation tensor that a block
returns, and the next block reads it from its input. Nothing about a forward is stored on a module, so threads,
activation checkpointing, deepcopy and compiled graphs are safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.compiled import counted, refuse_script, settled
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Plan
from tokenreduce.readable import length
from tokenreduce.reducer import Reducer
from tokenreduce.trace import Step, Trace, active

__all__ = [
    "Attended", "Reduced", "Site", "State", "Tower", "attach_tower", "carry_state", "collect_states", "full_plan",
    "pool_mean", "set_state", "sites_for", "state_of",
]  # fmt: skip

_ON_TENSOR = "_tokenreduce_state"
_ON_BLOCK = "_tokenreduce_site"


class State:
    """What is known about the tokens of one activation tensor (B,N,C). Never changed in place."""

    __slots__ = ("entry", "origin", "plans", "proportional", "size", "valid")

    def __init__(
        self,
        entry: int,
        size: Tensor | None = None,
        valid: Tensor | None = None,
        origin: Tensor | None = None,
        plans: tuple[Plan, ...] = (),
        proportional: bool = False,
    ) -> None:
        self.entry = entry
        self.size = size
        self.valid = valid
        self.origin = origin
        self.plans = plans
        self.proportional = proportional

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B,1,1,N) to add to attention logits: log size where it counts, -inf for slots that are not there."""
        if self.size is None or not (self.proportional or self.valid is not None):
            return None
        bias = self.size.float().log() if self.proportional else torch.zeros_like(self.size, dtype=torch.float32)
        if self.valid is not None:
            bias = bias.masked_fill(~self.valid, float("-inf"))
        return bias.to(dtype)[:, None, None, :]

    def patches(self, x: Tensor, prefix: int) -> int:
        """How many of the tokens ``x`` (B,N,C) are there and not protected, over all rows."""
        if self.valid is not None:
            return int(self.valid[:, prefix:].sum())
        return x.shape[0] * (x.shape[1] - prefix)

    def after(self, plan: Plan, proportional: bool) -> State:
        """The state of the tokens that ``plan`` leaves."""
        valid = plan.validity()
        size = plan.reduce_size(self.size)
        if self.valid is not None and size is not None:
            # What joins the slot of a padded token fills it; looking at the slot's own token would lose it.
            valid = size > 0
        if size is None and valid is not None:
            size = valid.float()
        origin = plan.representatives() if self.origin is None else plan.gather(self.origin)
        return State(self.entry, size, valid, origin, (*self.plans, plan), proportional or self.proportional)


def state_of(x: Tensor) -> State | None:
    """The state that a patched block left on its output, or None."""
    return getattr(x, _ON_TENSOR, None)


def set_state(x: Tensor, state: State | None) -> Tensor:
    if state is not None:
        setattr(x, _ON_TENSOR, state)
    return x


def carry_state(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook for a norm behind the last block: pooling then still knows sizes and plans."""
    if isinstance(output, Tensor):
        set_state(output, state_of(args[0]))


class Attended(NamedTuple):
    """What a family's attention half returns: its output before the residual, and what it was computed from.

    ``keys``, ``queries``, ``values`` are (B,H,N,d) as the adapter's page says (before RoPE where the family has it);
    ``rotated`` are queries and keys after RoPE, None where there is none.
    """

    out: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """One block's place: its layer and the reducer that acts there, if any. Frozen and picklable."""

    layer: int
    depth: int
    prefix: int
    cls: bool
    reducer: Reducer | None = None
    grid: tuple[int, ...] | None = None
    rope: str | None = None
    label: str = ""


class Reduced:
    """Mixin for patched blocks. A family subclass gives ``_attention``, ``_residual`` and ``_feed_forward``."""

    #: Attention and MLP are one branch, so what goes into the MLP is the block's input.
    _one_branch = False

    def _get_name(self) -> str:
        site: Site = self.__dict__[_ON_BLOCK]
        name = next(c for c in type(self).__mro__ if not issubclass(c, Reduced)).__name__
        return f"{name}[{site.reducer.spec()}]" if site.reducer is not None else f"{name}[tokenreduce]"

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks first."""
        refuse_script()

    # -- what a family says ------------------------------------------------------------------------------------------
    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        """The attention branch on the block input ``x`` (norm included), before the residual is added."""
        raise NotImplementedError("abstract")

    def _project(self, x: Tensor, context: Any) -> Attended:
        """Queries and keys of ``x`` without attending; ``out`` is unused."""
        raise NotImplementedError("abstract")

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        """The attention branch when the map (B,H,N,N) is given."""
        raise NotImplementedError("abstract")

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        raise NotImplementedError("abstract")

    def _feed_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("abstract")

    # -- the block ---------------------------------------------------------------------------------------------------
    def _run(self, x: Tensor, context: Any = None) -> Tensor:
        """The reduced forward. ``context`` is what the family needs besides ``x`` (rotary embeddings, kwargs)."""
        site: Site = self.__dict__[_ON_BLOCK]
        x = x if site.layer else counted(x)
        state = self._enter(site, x)
        reducer = None if site.reducer is None else settled(site.reducer)
        where = None if reducer is None else reducer.site()
        given = None
        if where == "before":
            assert reducer is not None
            x, state, given = self._reduce_before(site, reducer, x, state, context)
        entered = x
        if given is not None:
            got = self._attend_with(x, given, context)
        else:
            needs = () if reducer is None or where == "before" else reducer.gathers()
            got = self._attention(x, state.bias(x.dtype), needs, self._context(context, state))
        x = self._residual(x, got.out)
        if where == "middle":
            assert reducer is not None
            x, state = self._reduce(site, reducer, x, state, got, entered)
        # Nothing of the attention half may stay alive while the MLP holds its hidden layer: that is the peak.
        seen = got._replace(out=x) if where == "after" else None
        middle = None if where != "after" else entered if self._one_branch else x
        del got, entered
        x = self._feed_forward(x)
        if where == "after":
            assert reducer is not None
            assert seen is not None
            x, state = self._reduce(site, reducer, x, state, seen, middle)
        trace = active()
        if trace is not None and where in (None, "input"):
            step = Step("encoder", site.layer, x.shape[1], patches=state.patches(x, site.prefix))
            trace.add(self, step)  # type: ignore[arg-type]
        collected = _collected()
        if collected is not None:
            collected.append(state)
        return set_state(x, state)

    def _context(self, context: Any, state: State) -> Any:
        """``context`` for the tokens that are left (families with rotary embeddings gather rows here)."""
        return context

    def _enter(self, site: Site, x: Tensor) -> State:
        state = state_of(x)
        if state is None:
            if site.layer:
                raise RuntimeError(
                    f"the token sizes of the earlier blocks did not reach block {site.layer}: something between the "
                    "blocks makes new tensors (reentrant checkpointing, FSDP, a custom loop). Use non-reentrant "
                    "checkpointing, patch before wrapping, and run patched blocks in order."
                )
            state = State(length(x))
        return state

    def _evidence(self, site: Site, x: Tensor, state: State, got: Attended, before: Tensor | None) -> Evidence:
        return Evidence(
            x,
            got.keys,
            got.queries,
            size=state.size,
            protected=site.prefix,
            grid=site.grid if site.grid and state.entry == site.prefix + math.prod(site.grid) else None,
            values=got.values,
            valid=state.valid,
            before=before,
            cls=site.cls,
            rope=site.rope,
            rotated=got.rotated,
            scale=getattr(self, "_scale", None),
            proportional=state.proportional,
            layer=site.layer,
            depth=site.depth,
            entry=state.entry,
        )

    def _reduce(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, got: Attended, before: Tensor | None
    ) -> tuple[Tensor, State]:
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            plan = reducer.plan(self._evidence(site, x, state, got, before))
            if not plan.is_identity:
                x, state = plan.reduce(x, state.size), state.after(plan, reducer.proportional)
        if trace is not None:
            self._note(trace, site, reducer, x, plan, state)
        return x, state

    def _note(self, trace: Trace, site: Site, reducer: Reducer, x: Tensor, plan: Plan, state: State) -> None:
        acted = None if plan.is_identity else plan
        left = state.patches(x, site.prefix)
        step = Step("encoder", site.layer, x.shape[1], acted, reducer.spec(), patches=left)
        trace.add(self, step)  # type: ignore[arg-type]

    def _reduce_before(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, context: Any
    ) -> tuple[Tensor, State, Tensor | None]:
        """Reduce the block's input; a reducer with ``forwards_attention`` also hands on its reduced map."""
        got = Attended(x)
        if reducer.gathers():
            got = self._project(x, self._context(context, state))
        if not getattr(reducer, "forwards_attention", False):
            reduced, left = self._reduce(site, reducer, x, state, got, None)
            return reduced, left, None
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            evidence = self._evidence(site, x, state, got, None)
            plan = reducer.plan(evidence)
            given = None
            if not plan.is_identity:
                given = plan.reduce_attention(evidence.attention("all"), state.size).to(x.dtype)
                x, state = plan.reduce(x, state.size), state.after(plan, reducer.proportional)
        if trace is not None:
            self._note(trace, site, reducer, x, plan, state)
        return x, state, given


# -- states of every layer, for dense outputs ------------------------------------------------------------------------
_collecting: ContextVar[list[State] | None] = ContextVar("tokenreduce_states", default=None)


def _collected() -> list[State] | None:
    return None if torch.compiler.is_compiling() else _collecting.get()


@contextmanager
def collect_states() -> Iterator[list[State]]:
    """The state after every block that runs inside, in order."""
    states: list[State] = []
    token = _collecting.set(states)
    try:
        yield states
    finally:
        _collecting.reset(token)


def full_plan(state: State) -> Plan | None:
    """All plans so far as one, from the tokens at the entry to those that are left; None when none acted."""
    composed: Plan | None = None
    for plan in state.plans:
        composed = plan if composed is None else composed.then(plan)
    return composed


def expand_patches(patches: Tensor, state: State, prefix: int) -> Tensor:
    """Patch tokens (B,K-prefix,C) back to (B,N-prefix,C): merged tokens are copied, dropped ones are zero."""
    plan = full_plan(state)
    if plan is None:
        return patches
    head = patches.new_zeros(patches.shape[0], prefix, patches.shape[2])
    return plan.expand(torch.cat([head, patches], 1))[:, prefix:]


# -- pooling ---------------------------------------------------------------------------------------------------------
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


# -- attaching -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tower:
    """One vision transformer found inside a model."""

    name: str  # path inside the patched model, "" for the model itself
    module: nn.Module
    family: str
    blocks: tuple[nn.Module, ...]
    classes: dict[type, type]  # block class -> patched class
    prefix: int
    cls: bool
    grid: tuple[int, ...] | None  # (rows, columns), or (frames, rows, columns) of a video encoder
    evidence: tuple[str, ...]
    rope: str | None = None
    resizes: bool = True  # whether the model takes smaller images, for methods that act on the input

    @property
    def tokens(self) -> int | None:
        """Tokens at the entry for the model's own image size, prefix included."""
        return None if self.grid is None else self.prefix + math.prod(self.grid)


def sites_for(tower: Tower, reducers: tuple[Reducer, ...]) -> list[Site]:
    """One site per block. Raises ``ValueError`` where a reducer does not fit or two act in one layer."""
    depth = len(tower.blocks)
    base = Site(0, depth, tower.prefix, tower.cls, None, tower.grid, tower.rope, tower.name)
    sites = []
    for layer in range(depth):
        acting = [r for r in reducers if r.site() != "input" and r.acts(layer, depth)]
        if len(acting) > 1:
            names = " and ".join(r.spec() for r in acting)
            raise ValueError(
                f"{names} both act in layer {layer}; give them different layers "
                "(for instance r=[8,8,0,0] and layers=[2])"
            )
        sites.append(replace(base, layer=layer, reducer=acting[0] if acting else None))
    for reducer in reducers:
        missing = [n for n in reducer.gathers() if n not in tower.evidence]
        if missing:
            raise ValueError(
                f"{reducer.name} needs {', '.join(missing)}, which {tower.family} cannot give "
                f"(it gives {', '.join(tower.evidence)}); choose another method, "
                "tr.describe(model) lists those that fit"
            )
    return sites


def attach_tower(tower: Tower, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Swap the classes of a tower's blocks. Raises ``TypeError`` for block classes that the family does not know."""
    sites = sites_for(tower, reducers)
    for block in tower.blocks:
        if type(block) not in tower.classes:
            known = ", ".join(sorted(c.__name__ for c in tower.classes))
            raise TypeError(f"{tower.family}: block class {type(block).__name__} is not supported; supported: {known}")
        if "forward" in vars(block):
            raise ValueError(
                f"{type(block).__name__} has a forward of its own on the instance (accelerate's dispatch puts one "
                "there); call tr.patch before dispatching the model"
            )
    for block, site in zip(tower.blocks, sites, strict=True):
        undo.set(block, _ON_BLOCK, site)
        undo.swap_class(block, tower.classes[type(block)])
