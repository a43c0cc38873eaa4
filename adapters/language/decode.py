"""Decode steps in which a method chooses again: which cached tokens the new token sees, and tokens that come back.

Before its layer, a method is asked in every decode step with the attention that the new token paid in the layer
before (``Reducer.decode_mode``). From there to its next layer, attention is over the tokens that it left: their keys
and values are gathered from the cache, which stays complete. A token whose keys the caches of those layers lack,
because an earlier choice let it go, comes back where the method says so: its features were set aside when it went, run
through the layers beside the new token at its own position, and its keys are appended to the caches, so that it passes
each layer at most once.

Tokens are named by columns: those of the prompt, then one for every token behind it. Caches hold them in the order in
which they came, so once tokens came back, :class:`Again` knows which column each slot has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, implementation, softcap_of
from tokenreduce.adapters.language.again import REMEMBERED, Pick, Site, columns_of_slots, real_columns
from tokenreduce.adapters.language.decoders import needs_ids
from tokenreduce.adapters.language.generation import KEYWORD, Run, Step, cache_in
from tokenreduce.adapters.language.later import columns_of_mask
from tokenreduce.adapters.language.revive import come_back
from tokenreduce.core.evidence import Attention, Earlier, LanguageEvidence, Prompt
from tokenreduce.core.trace import DecodeStep, active

__all__ = ["choose_again", "last_only"]


def choose_again(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a decoder layer, in front of what makes masks: in decode, ask the method and show the layer
    the keys of what it left. The layer then has a :class:`Call`, and needs no other mask."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None or step.prefill or step.run.again is None:
        return None
    run, x, cache = step.run, args[0], cache_in(kwargs)
    run.check_batch(x.shape[0])
    if step.new > 1:
        return _turn(layer, args, kwargs, step, index, site)
    if step.masked:
        raise ValueError(
            "attention_mask says by itself what a new token sees, where a method on this model chooses that in every "
            "decode step; give a padding mask (batch, tokens), or leave that method out"
        )
    if site.method is not None:
        with torch.no_grad():
            x = _choose(layer, x, step, index, site, cache, kwargs["position_embeddings"])
    pick = None if site.since is None else step.picks.get(site.since)
    if pick is None:
        return None if x is args[0] else ((x, *args[1:]), kwargs)
    take, mask, columns = _shown(run, pick, index, cache)
    if mask is not None:
        name = implementation(layer.self_attn)
        if "flash" in name:
            mask = mask[:, 0, 0]
        elif name == "eager":
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
    call = Call(mask, record=site.reads, take=take)
    kwargs = {**kwargs, "attention_mask": mask, "position_ids": _ids(layer, kwargs), CALL: call}
    if pick.tables is not None:
        kwargs["position_embeddings"] = pick.tables
    if site.reads:
        run.calls[index], step.columns[index] = call, columns
    return (x, *args[1:]), kwargs


def last_only(step: Step, output: Any) -> Any:
    """What the last layer returns: what came back is in the caches; the model goes on with the new token alone."""
    if step.prefill or step.new > 1:
        return output
    if isinstance(output, tuple):
        return (output[0][:, -1:], *output[1:]) if output[0].shape[1] > 1 else output
    return output[:, -1:] if output.shape[1] > 1 else output


def _choose(
    layer: Any, x: Tensor, step: Step, index: int, site: Site, cache: Any, tables: tuple[Tensor, ...]
) -> Tensor:
    """Ask ``site.method``, note its choice in ``step.picks``, and give what enters the layer: ``x`` (B,Q,C), the new
    token last, with the tokens that come back instead of those that came back before another layer."""
    run, method = step.run, site.method
    assert method is not None
    assert run.again is not None
    total = run.columns(int(cache.layers[0].get_seq_length()))
    call = run.calls.pop(index - 1)
    filled = int(cache.layers[index - 1].get_seq_length())
    shown = step.columns.pop(index - 1, None)
    if shown is None:
        shown = columns_of_slots(run, index - 1, None, filled)
    row = _row(layer, call, shown)
    prompt = (shown >= 0) & (shown < run.length)
    at = shown.clamp(min=0, max=run.length - 1)
    known = run.again.earlier.setdefault(index, [])
    evidence = LanguageEvidence(
        row.new_zeros(*shown.shape, 0),
        Attention(given=row, valid=shown >= 0, cls=False),
        visual=prompt & run.visual.gather(1, at),
        valid=shown >= 0,
        layer=index,
        depth=site.depth,
        entry=run.length,
        prompt=Prompt(run.visual_at(-1), run.column_mask(-1)),
        earlier=Earlier(*(t.gather(1, at) for t in known[-1][1:])) if known else None,
        held=prompt & (known[-1][2] if known else _left(run, index)).gather(1, at),
    )
    plan = method.plan(evidence)
    stay = plan.sources() >= 0
    b, device = shown.shape[0], shown.device
    live = torch.zeros(b, total + 1, dtype=torch.bool, device=device)
    live.scatter_(1, torch.where((shown >= 0) & stay, shown, total), True)
    live = live[:, :total]
    live[:, -1] = True
    means = row[:, :, 0].mean(1)
    slot = torch.where(prompt, shown, run.length)
    attention = means.new_zeros(b, run.length + 1).scatter(1, slot, means)
    known.append((total - 1, attention[:, :-1], live[:, : run.length]))
    del known[:-REMEMBERED]
    if method.decode_mode() == "revive":
        x, pick = come_back(step, x, index, live, cache, tables)
    else:
        pick = None if plan.is_identity else Pick(live, shown[:, :0], None, None)
    if pick is not None:
        step.picks[index] = pick
    trace = active()
    if trace is not None:
        back = torch.zeros(b, dtype=torch.long, device=device) if pick is None else (pick.back >= 0).sum(1)
        trace.add_decode(layer, DecodeStep(index, method.spec(), live[:, : run.length] & run.visual, back))
    return x


def _left(run: Run, index: int) -> Tensor:
    """(B,L) bool: the columns of the prompt that layer ``index`` saw in prefill."""
    cut = run.cut_at(index)
    if cut is None:
        return torch.ones_like(run.visual)
    there = torch.ones_like(cut.index, dtype=torch.bool) if cut.valid is None else cut.valid
    out = torch.zeros(run.visual.shape[0], run.length + 1, dtype=torch.bool, device=run.visual.device)
    return out.scatter(1, torch.where(there, cut.index, run.length), True)[:, :-1]


def _row(layer: Any, call: Call, columns: Tensor) -> Tensor:
    """(B,H,1,S) what the new token, the last query, paid to the keys that have ``columns`` (B,S)."""
    assert call.queries is not None
    assert call.keys is not None
    q, k = call.queries[:, :, -1:], call.keys[:, :, : columns.shape[1]]
    call.queries, call.keys, call.values = None, None, None
    scale, softcap = getattr(layer.self_attn, "scaling", None), softcap_of(layer.self_attn)
    return Attention(q, k, scale=scale, softcap=softcap, valid=columns >= 0)("cls")  # of the one query


def _shown(run: Run, pick: Pick, index: int, cache: Any) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``(take, mask, columns)`` for a layer: the slots (B,K) of its cache whose keys it sees, in the order of their
    columns, a bool mask (B,1,Q,K), and the columns (B,K); no slots and no mask where it sees all of them."""
    cut = run.cut_at(index)
    key = id(cut)
    if key in pick.made:
        return pick.made[key]
    total = pick.live.shape[1]
    before = pick.before
    if before is None:
        before = columns_of_slots(run, index, None, int(cache.layers[index].get_seq_length()))
    new = torch.full_like(before[:, :1], total - 1)
    columns = torch.cat([before, pick.back, new], 1)
    seen = (columns >= 0) & pick.live.gather(1, columns.clamp(min=0))
    width = int(seen.sum(1).max())
    take = columns.masked_fill(~seen, -1).argsort(dim=1, stable=True)[:, columns.shape[1] - width :]
    valid = seen.gather(1, take)
    columns = columns.gather(1, take).masked_fill(~valid, -1)
    queries = torch.cat([pick.back, new], 1)
    mask: Tensor | None = None
    if queries.shape[1] > 1:
        # Rows that are padding see everything, so that none is empty; nobody sees them.
        mask = valid[:, None] & ((columns[:, None] <= queries[..., None]) | (queries < 0)[..., None])
        mask = mask[:, None]
    elif not bool(valid.all()):
        mask = valid[:, None, None]
    every = width == seen.shape[1] and bool((take.diff(dim=1) == 1).all())
    pick.made[key] = (None if every else take, mask, columns)
    return pick.made[key]


def _turn(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, index: int, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Several new tokens, a later turn: no choice is made, and they see all that the caches hold."""
    run, cache = step.run, cache_in(kwargs)
    assert run.again is not None
    if site.since is None or site.since not in run.again.slots:
        return None
    x, n = args[0], step.new
    past = int(cache.layers[index].get_seq_length())
    total = run.columns(int(cache.layers[0].get_seq_length()))
    new = torch.arange(total - n, total, device=x.device).expand(len(x), -1)
    if site.method is not None:
        run.again.slots[index] = torch.cat([columns_of_slots(run, index, index, past), real_columns(run, new)], 1)
    columns, stock = run.again.slots[site.since], kwargs.get("attention_mask")
    if isinstance(stock, Tensor) and stock.dim() == 4:
        mask = columns_of_mask(stock, columns, columns >= 0, step, cache)
        return args, {**kwargs, "attention_mask": mask, "position_ids": None, CALL: Call(mask)}
    mask = ((columns >= 0)[:, None] & (columns[:, None] <= new[..., None]))[:, None]
    own = torch.arange(columns.shape[1], device=x.device) == past + torch.arange(n, device=x.device)[:, None]
    mask = mask | (own & ~mask.any(-1, keepdim=True))
    if implementation(layer.self_attn) == "eager":
        mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
    return args, {**kwargs, "attention_mask": mask, "position_ids": _ids(layer, kwargs), CALL: Call(mask)}


def _ids(layer: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Position ids of the new tokens for a layer that needs them; no tokens come back there."""
    return kwargs.get("position_ids") if needs_ids(layer) else None
