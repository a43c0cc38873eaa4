"""The block that reduces tokens, which all encoder adapters share.

How it works. A patched block's class is swapped for a subclass that mixes in :class:`Reduced` and says how its family
computes the attention half and the MLP half. Between them the site hands evidence to the reducer and applies its
plan. Sizes, positions and the plans so far live in a :class:`~tokenreduce.adapters.encoders.state.State` attached to
the activation tensor that a block returns, and the next block reads it from its input. Nothing about a forward is
stored on a module, so threads, activation checkpointing, deepcopy and compiled graphs are safe.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Attended
from tokenreduce.adapters.encoders.frames import merge_frames
from tokenreduce.adapters.encoders.pixels import AtEntry, entry_plan
from tokenreduce.adapters.encoders.rebuilding import aside_of, complete, note_entered, shown
from tokenreduce.adapters.encoders.site import ON_BLOCK, Site
from tokenreduce.adapters.encoders.state import COLLECTING, State, entry_of, note_entry, set_state, state_of
from tokenreduce.core.compiled import counted, refuse_script, settled
from tokenreduce.core.evidence import Attention, EncoderEvidence
from tokenreduce.core.evidence.encoder import TracedEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.readable import length
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import Step, Trace, active

__all__ = ["Reduced", "View", "planned"]


class View(NamedTuple):
    """What evidence says of the tokens that rows see: how many entered, their grid, the power of sizes by which rows
    count keys, and the mask (B,1,N,N) of what each sees, None for everything."""

    entry: int
    grid: tuple[int, ...] | None
    proportional: float
    mask: Tensor | None = None


class Reduced:
    """Mixin for patched blocks. A family subclass gives ``_attention``, ``_residual`` and ``_feed_forward``."""

    #: Attention and MLP are one branch, so what goes into the MLP is the block's input.
    _one_branch = False

    def _get_name(self) -> str:
        site: Site = self.__dict__[ON_BLOCK]
        name = next(c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, Reduced)).__name__
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
    def _quiet(self, x: Tensor) -> State | None:
        """The state of ``x`` where the stock block does all there is to do: nothing acts here, attention needs no bias,
        and nobody records. Families whose stock block may see fewer tokens ask, and call it."""
        site: Site = self.__dict__[ON_BLOCK]
        if not site.quiet or torch.compiler.is_compiling() or active() is not None or COLLECTING.get() is not None:
            return None
        state = state_of(x)
        if state is None:
            return None if site.layer else self._enter(site, x)
        biased = state.valid is not None or (state.size is not None and state.proportional)
        return None if biased or state.aside is not None else state

    def _run(self, x: Tensor, context: Any = None) -> Tensor:
        """The reduced forward. ``context`` is what the family needs besides ``x`` (rotary embeddings, kwargs)."""
        site: Site = self.__dict__[ON_BLOCK]
        x = _counted(x) if site.first else x
        state = state_of(x)
        state = self._enter(site, x) if state is None else state
        if site.entry is not None:
            x, state = self._drop_by_pixels(site, site.entry, x, state)
        reducer, where, tracing = site.reducer, site.where, torch.compiler.is_compiling()
        if tracing and reducer is not None:
            reducer = settled(reducer)
        given, first = None, x if site.leads else None
        every = None if state.aside is None else state.aside.every(x, site.layer)
        if where == "before":
            assert reducer is not None
            if reducer.rebuilds:
                every, x, state = self._set_aside(site, reducer, x, state)
            else:
                x, state, given = self._reduce_before(site, reducer, x, state, context)
        entered = x
        needs = () if where == "before" else site.needs
        got = self._attended(x, state, needs, context, given, every)
        x = self._residual(x, got.out) if every is None else state.aside.take(self._residual(every, got.out))
        if where == "middle":
            assert reducer is not None
            x, state = self._reduce(site, reducer, x, state, got, entered)
        # Nothing of the attention half may stay alive while the MLP holds its hidden layer: that is the peak.
        seen = got._replace(out=x) if where == "after" else None
        middle = None if where != "after" else entered if self._one_branch else x
        del got, entered, every
        x = self._feed_forward(x)
        if where == "after":
            assert reducer is not None
            assert seen is not None
            x, state = self._reduce(site, reducer, x, state, seen, middle)
        if where is None and site.entry is None and (trace := active()) is not None:
            self._note(trace, site, None, x, None, state)
        if state.aside is not None and site.layer == site.depth - 1:
            x, state = complete(x, state)
        collected = None if tracing else COLLECTING.get()
        if collected is not None:
            collected.append(state)
        if first is not None:
            note_entered(x, first)
        return set_state(x, state)

    def _attended(
        self, x: Tensor, state: State, needs: tuple[str, ...], context: Any, given: Tensor | None, every: Tensor | None
    ) -> Attended:
        """The attention branch of ``x``, with a ``given`` map, or of ``every`` token where some are set aside."""
        if given is not None:
            return self._attend_with(x, given, self._context(context, state))
        if every is not None:
            x, state = every, state.aside.before
        return self._attention(x, state.bias(x.dtype), needs, self._context(context, state))

    def _context(self, context: Any, state: State) -> Any:
        """``context`` for the tokens that are left (families with rotary embeddings gather rows here)."""
        return context

    def _enter(self, site: Site, x: Tensor) -> State:
        """The state of tokens that no block has seen."""
        if site.layer:
            raise RuntimeError(
                f"the token sizes of the earlier blocks did not reach block {site.layer}: something between the "
                "blocks makes new tensors (reentrant checkpointing, FSDP, a custom loop). Use non-reentrant "
                "checkpointing, patch before wrapping, and run patched blocks in order."
            )
        entry = entry_of(x)
        return State(length(x), grid=None if entry is None else entry.grid)

    def _drop_by_pixels(self, site: Site, entry: AtEntry, x: Tensor, state: State) -> tuple[Tensor, State]:
        """What a method at the input leaves for the first block."""
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            plan = entry_plan(entry, x, state, site.prefix, site.depth)
            if not plan.is_identity:
                x, size = plan.reduce_both(x, state.size)
                state = state.after(plan, False, size)
        if trace is not None:
            self._note(trace, site, entry.reducer, x, plan, state)
        return x, state

    def _set_aside(self, site: Site, reducer: Reducer, x: Tensor, state: State) -> tuple[Tensor | None, Tensor, State]:
        """What a method that rebuilds leaves of ``x``, in front of it all tokens where attention is over them yet."""
        trace = active()
        every, choice = None, None
        with nullcontext() if trace is None else trace.clock():
            known = {"cls": site.cls, "layer": site.layer, "depth": site.depth}
            plan = planned(reducer, shown(reducer, x, state, site.prefix, **known))
            if not plan.is_identity:
                aside = aside_of(reducer, plan, x, state, site.prefix, site.layer)
                choice, every = aside.left, x if site.layer < aside.until else None
                x, state = aside.take(x), state.after(choice, False)
                state.aside = aside
        if trace is not None:
            self._note(trace, site, reducer, x, choice, state)
        return every, x, state

    def _evidence(
        self, site: Site, x: Tensor, state: State, got: Attended, before: Tensor | None, view: View | None = None
    ) -> EncoderEvidence:
        """Evidence of the tokens ``x``; ``view`` says where rows see other tokens than their own sample's."""
        view = View(state.entry, state.full_grid(site.prefix), state.proportional) if view is None else view
        mask = got.table if view.mask is None else view.mask
        rows = Attention(
            got.queries, got.keys, got.values, rotated=got.rotated, rope=site.rope, scale=getattr(self, "_scale", None),
            mask=mask, size=state.size, valid=state.valid, proportional=view.proportional, cls=site.cls,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            return TracedEvidence(
                x, rows, size=state.size, protected=site.prefix, grid=view.grid, valid=state.valid, before=before,
                cls=site.cls, layer_of=lambda: site.layer, depth=site.depth, entry=view.entry,
                origin=lambda: state.origin,
            )  # fmt: skip
        return EncoderEvidence(
            x, rows, size=state.size, protected=site.prefix, grid=view.grid, valid=state.valid, before=before,
            cls=site.cls, layer=site.layer, depth=site.depth, entry=view.entry,
            origin=lambda: state.origin,
        )  # fmt: skip

    def _reduce(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, got: Attended, before: Tensor | None
    ) -> tuple[Tensor, State]:
        trace = active()
        if reducer.merges_frames:
            with nullcontext() if trace is None else trace.clock():
                x, state = merge_frames(reducer, x, state, site.prefix, layer=site.layer, depth=site.depth)
            if trace is not None:
                self._note(trace, site, reducer, x, None, state)
            return x, state
        if trace is None:
            return self._acted(site, reducer, x, state, got, before)[:2]
        with trace.clock():
            x, state, plan = self._acted(site, reducer, x, state, got, before)
        self._note(trace, site, reducer, x, plan, state)
        return x, state

    def _acted(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, got: Attended, before: Tensor | None
    ) -> tuple[Tensor, State, Plan]:
        evidence = self._evidence(site, x, state, got, before)
        plan = reducer.plan(evidence) if x.shape[0] else planned(reducer, evidence)
        if not plan.is_identity:
            x, size = plan.reduce_both(x, state.size)
            state = state.after(plan, reducer.size_power, size)
        return x, state, plan

    def _note(
        self, trace: Trace, site: Site, reducer: Reducer | None, x: Tensor, plan: Plan | None, state: State
    ) -> None:
        acted = None if plan is None or plan.is_identity else plan
        name = "" if reducer is None else reducer.spec()
        left, grid = state.patches(x, site.prefix), state.full_grid(site.prefix)
        aside = state.aside is not None
        step = Step("encoder", site.layer, x.shape[1], acted, name, patches=left, grid=grid, aside=aside)
        trace.add(self, step)  # type: ignore[arg-type]

    def _reduce_before(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, context: Any
    ) -> tuple[Tensor, State, Tensor | None]:
        """Reduce the block's input; a reducer with ``forwards_attention`` also hands on its reduced map."""
        got = Attended(x)
        if reducer.required():
            got = self._project(x, self._context(context, state))
        if not getattr(reducer, "forwards_attention", False):
            reduced, left = self._reduce(site, reducer, x, state, got, None)
            return reduced, left, None
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            evidence = self._evidence(site, x, state, got, None)
            plan = planned(reducer, evidence)
            given = None
            if not plan.is_identity:
                given = plan.reduce_attention(evidence.attention("all"), state.size).to(x.dtype)
                x, state = plan.reduce(x, state.size), state.after(plan, reducer.size_power)
        if trace is not None:
            self._note(trace, site, reducer, x, plan, state)
        return x, state, given


def _counted(x: Tensor) -> Tensor:
    """:func:`counted` tokens, with what is noted on them."""
    made, entry = counted(x), entry_of(x)
    if made is not x:
        set_state(made, state_of(x))
        if entry is not None:
            note_entry(made, entry)
    return made


def planned(reducer: Reducer, evidence: EncoderEvidence) -> Plan:
    """The reducer's plan; for an empty batch that of one sample of equal tokens, without the sample."""
    if evidence.batch:
        return reducer.plan(evidence)
    return reducer.plan(evidence.one_of_ones()).rows_at(torch.empty(0, dtype=torch.long, device=evidence.x.device))
