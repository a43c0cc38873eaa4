"""Keys and values of a layer by the plan of a cache-stage method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.cache_view import CacheView, Running, grown
from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.held import Held
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.site import LayerCall
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.host import on_host, values
from tokenreduce.core.plan import Merge, Plan, Prune
from tokenreduce.core.trace import CacheStep, active

__all__ = ["check_layer", "shown", "thin"]


def check_layer(layer: Any, method: CacheReducer) -> None:
    """Raise ``ValueError`` for a cache whose layers cannot lose keys."""
    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ValueError(
            f"{method.spec()} takes keys out of the cache, and a {kind} cannot lose any (static caches have fixed "
            f"places, quantised ones are packed); leave cache_implementation out, for a dynamic cache"
        )


def thin(method: CacheReducer, plan: Plan, view: CacheView, call: LayerCall) -> None:
    """Let the cache of a call's layer hold what ``plan`` leaves of ``view``; the identity touches nothing."""
    layer, evidence = call.cache.layers[call.index], view.evidence
    before = _nbytes(layer)
    if not plan.is_identity:
        heads = (evidence.batch, evidence.kv_heads)
        layer.keys, layer.values = (t.unflatten(0, heads).contiguous() for t in _reduced(method, plan, evidence))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = layer.keys.shape[2]
        call.columns.held[call.index] = _held(method, plan, view, call)
        state = call.state.get(Running, call.index)
        if state is not None and state.scores is not None:
            scores = grown(state.scores, evidence.n)
            assert scores is not None
            state.scores = plan.gather(scores)
    trace = active()
    if trace is not None:
        left = evidence.counts if plan.is_identity else plan.places().sum(1, keepdim=True)
        had, has = (evidence.unfold(t[:, 0]) for t in (evidence.counts, left))
        together = method.moment() == "prompt"
        step = CacheStep(
            call.index, evidence.step, method.spec(), had, has, before, _nbytes(layer), together
        )  # fmt: skip
        trace.add_cache(call.layer, step)


def _reduced(method: CacheReducer, plan: Plan, evidence: CacheEvidence) -> tuple[Tensor, ...]:
    """Keys and values (B*Hkv,K,d) that a plan leaves."""
    if isinstance(plan, Prune):
        return plan.reduce_alike(evidence.keys, evidence.values)
    merged = isinstance(plan, Merge) or not bool(plan.untouched().all())
    keys = plan.reduce(evidence.keys) if not merged or method.merges_keys(evidence) else plan.gather(evidence.keys)
    return keys, plan.reduce(evidence.values)


def _nbytes(layer: Any) -> int:
    return int(sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)))


def _held(method: CacheReducer, plan: Plan, view: CacheView, call: LayerCall) -> Held:
    """What the slots are that a plan leaves."""
    evidence, forward = view.evidence, call.forward
    valid = plan.validity()
    if evidence._valid is not None:  # a plan may name a slot that was not there as filler
        mine = evidence.there.gather(1, plan.representatives())
        valid = mine if valid is None else valid & mine
        valid = None if bool(valid.all()) else valid
    heads = (evidence.batch, evidence.kv_heads)
    kept = plan.gather(view.columns.at).unflatten(0, heads)
    there = None if valid is None else valid.unflatten(0, heads)
    bias = _bias(method, plan, evidence, call.columns)
    alike = _alike(kept) and (there is None or _alike(there))
    if alike and bias is None:
        kept, there = kept[:, :1], None if there is None else there[:, :1]
    return Held(ColumnIndex(kept, there), call.columns.length if call.prefill else forward.past + forward.new, bias)


def _alike(t: Tensor) -> bool:
    """Whether all heads of ``t`` (B,H,K) have the same."""
    if on_host(t):
        array = values(t)
        return bool((array == array[:, :1]).all())
    return bool((t == t[:, :1]).all())


def _bias(method: CacheReducer, plan: Plan, evidence: CacheEvidence, columns: Columns) -> Tensor | None:
    """(B,Hkv,K) what is added to the logits of slots that stand for several tokens: what they had before, and log of
    how many keys join where the method counts them."""
    (b, heads, n), index = (evidence.batch, evidence.kv_heads, evidence.n), evidence.layer
    held, cut = columns.held.get(index), columns.cut_at(index)
    known = held.bias if held is not None else None if cut is None or cut.bias is None else cut.bias[:, None]
    bias: Tensor | None = None
    if known is not None:
        flat = known.expand(b, heads, -1).flatten(0, 1)
        bias = torch.cat([flat, flat.new_zeros(flat.shape[0], max(n - flat.shape[1], 0))], 1)[:, -n:]
    if method.counts_merged():
        sizes = plan.reduce_size(None if bias is None else bias.exp())
        return None if sizes is None else sizes.clamp(min=1.0).log().unflatten(0, (b, heads))
    return None if bias is None else plan.gather(bias).unflatten(0, (b, heads))


def shown(call: Call, plan: Plan, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Keys and values (B,Hkv,S,d) that one step's attention sees under a temporary ``plan``, and their mask, in place
    of that of all slots."""
    mask, (b, heads) = call.mask, keys.shape[:2]
    at = plan.representatives().unflatten(0, (b, heads))
    keys, values = (t.gather(2, at[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (keys, values))
    valid = plan.validity()
    if valid is None and not isinstance(mask, Tensor):
        return keys, values, mask
    groups = call.queries.shape[1] // heads  # type: ignore[union-attr]
    sees = torch.ones_like(at, dtype=torch.bool) if valid is None else valid.unflatten(0, (b, heads))
    out = sees[:, :, None].repeat_interleave(groups, 1)
    if isinstance(mask, Tensor):
        full = mask.expand(b, -1, -1, -1)
        full = full if full.shape[1] > 1 else full.expand(-1, heads * groups, -1, -1)
        per = full.gather(3, at.repeat_interleave(groups, 1)[:, :, None].expand(-1, -1, full.shape[2], -1))
        out = out & per if per.dtype == torch.bool else per.masked_fill(~out, torch.finfo(per.dtype).min)
    return keys, values, out
