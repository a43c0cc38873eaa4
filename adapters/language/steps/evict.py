"""The cache stage: a method takes keys out of a layer's cache, behind its prefill and while decoding."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.decoders import check_implementation
from tokenreduce.adapters.language.generation import Step
from tokenreduce.adapters.language.held_mask import held_mask
from tokenreduce.adapters.language.rotary import Turning
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.adapters.language.thin import Running, check_layer, evidence_of, shown, thin
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan, take
from tokenreduce.core.trace import active

__all__ = ["Evict", "ShowHeld"]


@dataclass(frozen=True)
class ShowHeld(LayerStep):
    """Behind the prompt: the mask of what a thinned cache holds; ``groups`` query heads share a KV head."""

    window: int | None = None
    groups: int = 1

    def before(self, call: LayerCall) -> None:
        held = call.run.held.get(call.index)
        if call.step.prefill or held is None or call.cache is None:
            return
        call.run.check_batch(call.x.shape[0])
        name = check_implementation(call.layer, call.index, self.window)
        call.mask = held_mask(
            held, call.mask, call.x, call.step, call.index, call.cache, self.window, name, self.groups
        )  # fmt: skip

    def __str__(self) -> str:
        return "show what is held"


@dataclass(frozen=True)
class Evict(LayerStep):
    """``method`` on the cache of this layer of ``depth``; ``last`` is the last one where it acts, behind which it
    decides where it shares a budget over layers."""

    method: CacheReducer
    depth: int
    last: int
    turning: Turning | None = None
    mrope: bool = False
    ends = True

    @property
    def looks(self) -> bool:
        """Whether the method looks at attention."""
        return "attention" in self.method.required()

    def before(self, call: LayerCall) -> None:
        if call.cache is None:
            if call.step.prefill:
                _say_uncached(self.method)
            return
        if call.step.prefill:
            check_layer_of(call, self.method)
            wanted = self.looks and self.method.moment() != "never"
            wanted = wanted or (self.looks and self.method.every() > 0)
        elif self.method.temporary() and call.step.new == 1:
            made = Call(call.mask, record=True)
            made.select = functools.partial(self._select, call, made)
            call.attention = made
            return
        else:
            wanted = self.looks and self.method.every() > 0
        if not wanted:
            return
        made = call.attention or Call(call.mask)
        made.record = True
        call.attention = made

    def behind(self, call: LayerCall, output: Any) -> Any:
        if call.cache is None or (not call.step.prefill and (not self.method.every() or self.method.temporary())):
            return output
        with torch.no_grad():
            trace = active()
            if trace is None:
                self._decide(call)
            else:
                with trace.clock():
                    self._decide(call)
        return output

    def _evidence(self, call: LayerCall, queries: Tensor | None) -> tuple[CacheEvidence, Tensor, Tensor | None]:
        rotary = None if self.turning is None else self.turning.of(call.step, call.cache, call.index, call.x)
        return evidence_of(
            self.method, call.step, call.index, self.depth, call.cache, call.layer.self_attn, queries, call.mask,
            rotary, self.mrope,
        )  # fmt: skip

    def _decide(self, call: LayerCall) -> None:
        method, run, step, index = self.method, call.run, call.step, call.index
        if step.prefill:  # a cache may make its layers when they are first used
            check_layer(call.cache.layers[index], method)
        queries = call.attention.queries if self.looks and call.attention is not None else None
        if step.prefill and index in run.running:  # a checkpointed layer runs again
            return
        state = run.running.setdefault(index, Running())
        if not step.prefill:
            queries = _recent(state, queries, method.recent_queries())
        evidence, columns, order = self._evidence(call, queries)
        if step.prefill and queries is not None and (recent := method.recent_queries()) > 1:
            state.queries = evidence.queries[:, :, -recent:].unflatten(0, (evidence.batch, -1)).flatten(1, 2)
        score, memory = method.score(evidence), method.remember(evidence)
        if step.prefill and method.moment() == "prompt":
            state.scores, state.memory = score, memory
            run.summaries[index] = (method.summary(evidence), columns, call.layer)
            if index == self.last:
                self._together(call)
            return
        plan = None
        if method.moment() == "layer" if step.prefill else _due(method, step):
            plan = method.plan(evidence)
        state.scores, state.memory = score, memory
        if plan is not None:
            thin(method, plan, evidence, columns, step, call.cache, call.layer)
        if step.prefill:
            _note(state, plan, evidence, order)

    def _together(self, call: LayerCall) -> None:
        """Plans of all layers at once, behind the last."""
        run = call.run
        kept, run.summaries = run.summaries, {}
        plans = self.method.decide([kept[i][0] for i in sorted(kept)])
        for i, plan in zip(sorted(kept), plans, strict=True):
            _, columns, layer = kept[i]
            here = LayerCall(layer, i, call.x, {**call.kwargs, "attention_mask": None}, call.step)
            evidence, columns, order = self._evidence(here, None)
            thin(self.method, plan, evidence, columns, call.step, call.cache, layer)
            _note(run.running[i], plan, evidence, order)

    def _select(self, call: LayerCall, made: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Inside the attention of a decode step, the cache updated: what this step sees."""
        with torch.no_grad():
            run = call.run
            state = run.running.setdefault(call.index, Running())
            evidence, _, _ = self._evidence(call, made.queries)
            score, memory = self.method.score(evidence), self.method.remember(evidence)
            plan = self.method.plan(evidence)
            state.scores, state.memory = score, memory
        if plan.is_identity:
            return keys, values, made.mask
        return shown(made, plan, keys, values, made.mask)

    def __str__(self) -> str:
        return f"evict ({self.method.spec()})"


def check_layer_of(call: LayerCall, method: CacheReducer) -> None:
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


def _due(method: CacheReducer, step: Step) -> bool:
    """Whether an interval ends in this call, which may bring several tokens."""
    number = step.past + step.new - step.run.length
    return number // method.every() > (number - step.new) // method.every()


def _recent(state: Running, queries: Tensor | None, wanted: int) -> Tensor | None:
    """The queries of the last ``wanted`` tokens (of this call at least), as far as they are known."""
    if queries is None or wanted <= 1:
        return queries
    known = queries if state.queries is None else torch.cat([state.queries, queries], 2)
    state.queries = known[:, :, -max(wanted, queries.shape[2]) :]
    return state.queries


def _note(state: Running, plan: Plan | None, evidence: CacheEvidence, order: Tensor | None) -> None:
    """What the prompt left; scores in the order that the cache has, where it was not touched."""
    untouched = plan is None or plan.is_identity
    if plan is None or untouched:
        state.prompt_slots = evidence.counts
    else:
        state.prompt_slots = (plan.places() & evidence.there).sum(1, keepdim=True)
    if untouched and order is not None and state.scores is not None:
        back = evidence.fold(order.argsort(1))
        state.scores = take(state.scores, back)
