"""A cache-stage method at work on one layer: its evidence, and keys and values by its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call, softcap_of
from tokenreduce.adapters.language.generation import Run, Step
from tokenreduce.adapters.language.held import Held
from tokenreduce.adapters.language.held_mask import slots_of
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence, Rotary
from tokenreduce.core.plan import Merge, Plan, take
from tokenreduce.core.trace import CacheStep, active

__all__ = ["Running", "check_layer", "evidence_of", "shown", "thin"]


@dataclass
class Running:
    """What is remembered of one layer between decode steps: ``scores`` (B*Hkv,N) or (B*Hkv,N,S) of its slots, the last
    ``queries`` (B,H,R,d), how many slots the prompt's plan left, ``prompt_slots`` (B*Hkv,1), and whatever else the
    method keeps of every head, ``memory`` (B*Hkv,M)."""

    scores: Tensor | None = None
    queries: Tensor | None = None
    prompt_slots: Tensor | None = None
    memory: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """Follow beams: row i is what row ``rows[i]`` was."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.unflatten(0, (len(rows), -1))[rows].flatten(0, 1)

        self.scores, self.prompt_slots = pick(self.scores), pick(self.prompt_slots)
        self.memory = pick(self.memory)
        self.queries = None if self.queries is None else self.queries[rows]


def check_layer(layer: Any, method: CacheReducer) -> None:
    """Raise ``ValueError`` for a cache whose layers cannot lose keys."""
    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ValueError(
            f"{method.spec()} takes keys out of the cache, and a {kind} cannot lose any (static caches have fixed "
            f"places, quantised ones are packed); leave cache_implementation out, for a dynamic cache"
        )


def evidence_of(
    method: CacheReducer,
    step: Step,
    index: int,
    depth: int,
    cache: Any,
    module: Any,
    queries: Tensor | None,
    mask: Any,
    rotary: Rotary | None,
    mrope: bool,
) -> tuple[CacheEvidence, Tensor, Tensor | None]:
    """Evidence of layer ``index`` as its cache is now, the columns (B*Hkv,N) of its slots, and the order (B,N) they
    were put in, None where they were not.

    Slots of a right-padded prompt are put in order first, what is not there in front: evidence has the last queries of
    every sample at its end.
    """
    run, layer = step.run, cache.layers[index]
    keys, values = layer.keys, layer.values
    b, heads, n, _ = keys.shape
    filled = int(layer.get_seq_length())
    columns, there = (t[..., filled - n :] for t in slots_of(run, index, filled))
    number, total = (0, run.length) if step.prefill else (step.past + step.new - run.length, step.past + step.new)
    if queries is not None and queries.shape[2] > n:  # a sliding layer forgot the rest
        queries = queries[:, :, -n:]
    new = n if queries is None else queries.shape[2]
    rows = order = None
    if rotary is not None:
        rotary = replace(rotary, cos=rotary.cos[:, -n:], sin=rotary.sin[:, -n:])
    if isinstance(mask, Tensor) and mask.dim() == 4 and queries is not None:
        rows = mask if mask.shape[1] == 1 else mask[:, :: mask.shape[1] // heads].flatten(0, 1).unsqueeze(1)
        rows = rows[:, :, mask.shape[2] - min(new, mask.shape[2]) :, mask.shape[3] - n :]
    if step.prefill and not bool(there[..., -1].all()):
        order = there[:, 0].long().argsort(dim=1, stable=True)
        if queries is not None and new != n:
            raise ValueError("a padded prompt behind cached columns is padded on the left; set padding_side='left'")
        keys, values = (_at(t, order) for t in (keys, values))
        columns, there = (t.gather(2, order[:, None].expand(b, t.shape[1], n)) for t in (columns, there))
        queries = None if queries is None else _at(queries, order)
        if rotary is not None:
            rotary = replace(rotary, cos=take(rotary.cos, order), sin=take(rotary.sin, order))
        if rows is not None:
            rows = rows.expand(b, -1, -1, -1).gather(2, order[:, None, :, None].expand(-1, 1, -1, n))
            rows = rows.gather(3, order[:, None, None, :].expand_as(rows))
    if queries is not None and (wanted := method.query_rows()) is not None and step.prefill and wanted < new:
        queries, rows = queries[:, :, new - wanted :], None if rows is None else rows[:, :, new - wanted :]
    if queries is not None:
        queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
    at = columns.clamp(max=run.length - 1).flatten(1)
    visual = run.visual.gather(1, at).view_as(columns) & (columns < run.length) & there
    frames = None
    if "films" in method.required() and run.films is not None:
        frames = _frames(run, columns, visual)
    state = run.running.get(index)
    folded = columns.expand(b, heads, n).flatten(0, 1)
    one = columns.shape[1] == 1
    evidence = CacheEvidence(
        keys.flatten(0, 1), values.flatten(0, 1), queries=queries, kv_heads=heads, layer=index, depth=depth,
        visual=visual[:, 0] if one else visual.flatten(0, 1), valid=_valid(there, one), step=number,
        scores=None if state is None else _grown(state.scores, n), scale=getattr(module, "scaling", None),
        softcap=softcap_of(module), mask=rows, columns=folded, seen=_seen(run, total), frame_of=frames, rotary=rotary,
        prompt_slots=None if state is None else state.prompt_slots, memory=None if state is None else state.memory,
        mrope=mrope,
    )  # fmt: skip
    return evidence, folded, order


def _at(t: Tensor, order: Tensor) -> Tensor:
    """(B,H,N,d) in another order (B,N)."""
    return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


def _valid(there: Tensor, one: bool) -> Tensor | None:
    if bool(there.all()):
        return None
    return there[:, 0] if one else there.flatten(0, 1)


def _grown(scores: Tensor | None, n: int) -> Tensor | None:
    """Running scores with 0 for slots that came since."""
    if scores is None or scores.shape[1] == n:
        return scores
    return torch.cat([scores, scores.new_zeros(scores.shape[0], n - scores.shape[1], *scores.shape[2:])], 1)


def _seen(run: Run, total: int) -> Tensor:
    real = torch.full((len(run.visual), 1), total, device=run.visual.device)
    for mask in (run.mask, run.later):
        if mask is not None:
            real = real - (~mask).sum(1, keepdim=True)
    return real


def _frames(run: Run, columns: Tensor, visual: Tensor) -> Tensor:
    """(B*H,N) number of the frame of a slot, counted over the videos of a sample; -1 elsewhere."""
    assert run.films is not None
    b, h, n = columns.shape
    films = run.films.gather(1, columns.clamp(max=run.length - 1).flatten(1)[..., None].expand(-1, -1, 4))
    video, first = films[..., 0], films[..., 1]
    number = torch.where(video < 0, -1, video.clamp(min=0) * 100_000 + first).view(b, h, n)
    number = number.masked_fill(~visual, -1)
    return number[:, 0] if h == 1 else number.flatten(0, 1)


def thin(
    method: CacheReducer, plan: Plan, evidence: CacheEvidence, columns: Tensor, step: Step, cache: Any, owner: Any
) -> None:
    """Let a layer's cache hold what ``plan`` leaves of ``evidence``; the identity touches nothing. ``owner`` is the
    decoder layer, for the trace."""
    run, layer, index = step.run, cache.layers[evidence.layer], evidence.layer
    state = run.running.get(index)
    b, heads, n = evidence.batch, evidence.kv_heads, evidence.n
    before = layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
    if not plan.is_identity:
        merged = isinstance(plan, Merge) or not bool(plan.untouched().all())
        keys = plan.reduce(evidence.keys) if not merged or method.merges_keys(evidence) else plan.gather(evidence.keys)
        values = plan.reduce(evidence.values)
        layer.keys, layer.values = (t.unflatten(0, (b, heads)).contiguous() for t in (keys, values))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = layer.keys.shape[2]
        valid = plan.validity()
        if evidence._valid is not None:  # a plan may name a slot that was not there as filler
            mine = evidence.there.gather(1, plan.representatives())
            valid = mine if valid is None else valid & mine
            valid = None if bool(valid.all()) else valid
        total = run.length if step.prefill else step.past + step.new
        kept = plan.gather(columns).unflatten(0, (b, heads))
        there = None if valid is None else valid.unflatten(0, (b, heads))
        bias = _bias(method, plan, run, index, b, heads, n)
        if (
            bool((kept == kept[:, :1]).all())
            and (there is None or bool((there == there[:, :1]).all()))
            and bias is None
        ):
            kept, there = kept[:, :1], None if there is None else there[:, :1]
        run.held[index] = Held(kept, there, total, bias)
        if state is not None and state.scores is not None:
            scores = _grown(state.scores, n)
            assert scores is not None
            state.scores = plan.gather(scores)
    trace = active()
    if trace is not None:
        left = evidence.counts if plan.is_identity else plan.places().sum(1, keepdim=True)
        after = layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
        had, has = (evidence.unfold(t[:, 0]) for t in (evidence.counts, left))
        together = method.moment() == "prompt"
        trace.add_cache(owner, CacheStep(index, evidence.step, method.spec(), had, has, before, after, together))


def _bias(method: CacheReducer, plan: Plan, run: Run, index: int, b: int, heads: int, n: int) -> Tensor | None:
    """(B,Hkv,K) what is added to the logits of slots that stand for several tokens: what they had before, and log of
    how many keys join where the method counts them."""
    held, cut = run.held.get(index), run.cut_at(index)
    known = held.bias if held is not None else None if cut is None or cut.bias is None else cut.bias[:, None]
    bias: Tensor | None = None
    if known is not None:
        flat = known.expand(b, heads, -1).flatten(0, 1)
        bias = torch.cat([flat, flat.new_zeros(flat.shape[0], max(n - flat.shape[1], 0))], 1)[:, -n:]
    if method.counts_merged():
        sizes = plan.reduce_size(None if bias is None else bias.exp())
        return None if sizes is None else sizes.clamp(min=1.0).log().unflatten(0, (b, heads))
    return None if bias is None else plan.gather(bias).unflatten(0, (b, heads))


def shown(call: Call, plan: Plan, keys: Tensor, values: Tensor, mask: Any) -> tuple[Tensor, Tensor, Any]:
    """Keys and values (B,Hkv,S,d) that one step's attention sees under a temporary ``plan``, and their mask; ``mask``
    is that of all slots."""
    b, heads = keys.shape[:2]
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
