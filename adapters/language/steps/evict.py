"""The cache stage: a method takes keys out of a layer's cache, behind its prefill and while decoding."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.cache_view import CacheView, Running, Viewer
from tokenreduce.adapters.language.decoders import check_implementation
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.held_masks import held_mask
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.adapters.language.state import Record
from tokenreduce.adapters.language.thin import check_layer, shown, thin
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.plan import Plan, Prune, take
from tokenreduce.core.trace import active

__all__ = ["Evict", "ShowHeld"]


@dataclass(frozen=True)
class ShowHeld(LayerStep):
    """Behind the prompt: the mask of what a thinned cache holds; ``groups`` query heads share a KV head."""

    window: int | None = None
    groups: int = 1

    @property
    def rests(self) -> bool:
        """Windows count columns that are gone."""
        return self.window is None

    def before(self, call: LayerCall) -> None:
        held = call.columns.held.get(call.index)
        if call.prefill or held is None or call.cache is None:
            return
        call.columns.check_batch(call.x.shape[0])
        name = check_implementation(call.layer, call.index, self.window)
        call.mask = held_mask(call, held, self.window, name, self.groups)

    def __str__(self) -> str:
        return "show what is held"


@dataclass
class Summary(Record):
    """By layer: what its method kept of it, its ``value``, until all layers are decided together; ``layer`` is the
    decoder layer."""

    value: Any
    layer: Any


@dataclass(frozen=True)
class Evict(LayerStep):
    """A method on the cache of this layer, with the evidence of ``viewer``; ``last`` is the last layer where it acts,
    behind which it decides where it shares a budget over layers."""

    viewer: Viewer
    last: int
    ends = True

    @property
    def method(self) -> CacheReducer:
        return self.viewer.method

    @property
    def listens(self) -> bool:
        """Whether the method looks at attention."""
        return "attention" in self.method.required()

    @property
    def rests(self) -> bool:
        """Whether no key leaves in decode."""
        return not self.method.every() and not self.method.temporary()

    def before(self, call: LayerCall) -> None:
        if call.cache is None:
            if call.prefill:
                _say_uncached(self.method)
            return
        if call.prefill:
            _check_layer_of(call, self.method)
        elif self.method.temporary() and call.forward.phase == "decode":
            made = Call(call.mask, record=True)
            made.select = functools.partial(self._select, call, made)
            call.attention = made
            return
        often = self.method.every() > 0
        if self.listens and (often or (call.prefill and self.method.moment() != "never")):
            made = call.attention or Call(call.mask)
            made.record = True
            call.attention = made

    def behind(self, call: LayerCall, output: Any) -> Any:
        if call.cache is None or (not call.prefill and (not self.method.every() or self.method.temporary())):
            return output
        with torch.no_grad():
            trace = active()
            if trace is None:
                self._decide(call)
            else:
                with trace.clock():
                    self._decide(call)
        return output

    def _decide(self, call: LayerCall) -> None:
        queries = call.attention.queries if self.listens and call.attention is not None else None
        if call.prefill:
            check_layer(call.cache.layers[call.index], self.method)  # a cache may make its layers when first used
            if call.state.get(Running, call.index) is None:  # else a checkpointed layer runs again
                self._decide_prompt(call, queries)
        else:
            self._decide_step(call, queries)

    def _decide_prompt(self, call: LayerCall, queries: Tensor | None) -> None:
        method, state = self.method, call.state.of(Running, call.index)
        view = self.viewer.view(call, queries)
        evidence = view.evidence
        if queries is not None and (recent := method.recent_queries()) > 1:
            state.queries = evidence.queries[:, :, -recent:].unflatten(0, (evidence.batch, -1)).flatten(1, 2)
        score, memory = method.score(evidence), method.remember(evidence)
        if method.moment() == "prompt":
            state.scores, state.memory = score, memory
            call.state.put(Summary(method.summary(evidence), call.layer), call.index)
            if call.index == self.last:
                self._decide_together(call)
            return
        plan = method.plan(evidence) if method.moment() == "layer" else None
        state.scores, state.memory = score, memory
        if plan is not None:
            thin(method, plan, view, call)
        _note(state, plan, view)

    def _decide_step(self, call: LayerCall, queries: Tensor | None) -> None:
        method, state = self.method, call.state.of(Running, call.index)
        view = self.viewer.view(call, _recent(state, queries, method.recent_queries()))
        score, memory = method.score(view.evidence), method.remember(view.evidence)
        plan = method.plan(view.evidence) if _due(method, call.forward) else None
        state.scores, state.memory = score, memory
        if plan is not None:
            thin(method, plan, view, call)

    def _decide_together(self, call: LayerCall) -> None:
        """Plans of all layers at once, behind the last."""
        layers = call.state.layers(Summary)
        kept = [made for i in layers if (made := call.state.pop(Summary, i)) is not None]
        plans = self.method.decide([made.value for made in kept])
        for i, made, plan in zip(layers, kept, plans, strict=True):
            here = LayerCall(made.layer, i, call.x, {**call.kwargs, "attention_mask": None}, call.forward)
            view = self.viewer.view(here, None)
            thin(self.method, plan, view, here)
            _note(call.state.of(Running, i), plan, view)

    def _select(self, call: LayerCall, made: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Inside the attention of a decode step, the cache updated: what this step sees."""
        with torch.no_grad():
            state = call.state.of(Running, call.index)
            evidence = self.viewer.view(call, made.queries).evidence
            score, memory = self.method.score(evidence), self.method.remember(evidence)
            plan = self.method.plan(evidence)
            state.scores, state.memory = score, memory
        return (keys, values, made.mask) if plan.is_identity else shown(made, plan, keys, values)

    def __str__(self) -> str:
        return f"evict ({self.method.spec()})"


def _check_layer_of(call: LayerCall, method: CacheReducer) -> None:
    layers = call.cache.layers
    if call.index < len(layers):
        check_layer(layers[call.index], method)


def _say_uncached(method: CacheReducer) -> None:
    said = f"{method.spec()}: use_cache=False keeps no keys, so none were taken out"
    trace = active()
    if trace is not None:
        trace.note(said)
    else:
        warnings.warn(said, stacklevel=2)


def _due(method: CacheReducer, forward: Forward) -> bool:
    """Whether an interval ends in this call, which may bring several tokens."""
    number = forward.past + forward.new - forward.columns.length
    return number // method.every() > (number - forward.new) // method.every()


def _recent(state: Running, queries: Tensor | None, wanted: int) -> Tensor | None:
    """The queries of the last ``wanted`` tokens (of this call at least), as far as they are known."""
    if queries is None or wanted <= 1:
        return queries
    known = queries if state.queries is None else torch.cat([state.queries, queries], 2)
    state.queries = known[:, :, -max(wanted, queries.shape[2]) :]
    return state.queries


def _note(state: Running, plan: Plan | None, view: CacheView) -> None:
    """What the prompt left; scores in the order that the cache has, where it was not touched."""
    evidence, untouched = view.evidence, plan is None or plan.is_identity
    if plan is None or untouched:
        state.prompt_slots = evidence.counts
    elif type(plan) is Prune and plan.valid is None and evidence._valid is None:  # all that it names are there
        state.prompt_slots = torch.full((plan.batch, 1), plan.k, device=plan.device)
    else:
        state.prompt_slots = (plan.places() & evidence.there).sum(1, keepdim=True)
    if untouched and view.order is not None and state.scores is not None:
        back = evidence.fold(view.order.argsort(1))
        state.scores = take(state.scores, back)
