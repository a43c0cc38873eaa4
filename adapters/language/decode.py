"""Decode steps in which a method chooses again: which cached tokens the new token sees, and tokens that come back.

Before its layer, a method is asked in every decode step with the attention that the new token paid in the layer
before (``Reducer.later``). From there to its next layer, attention is over the tokens that it left: their keys and
values are gathered from the cache, which stays complete. A token whose keys the caches of those layers lack, because an
earlier choice let it go, comes back where the method says so: its features were set aside when it went, run through the
layers beside the new token at its own position, and its keys are appended to the caches, so that it passes each layer
at most once.

Tokens are named by columns: those of the prompt, then one for every token behind it. Caches hold them in the order in
which they came, so once tokens came back, :class:`Again` knows which column each slot has.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, implementation, softcap_of
from tokenreduce.adapters.language.decoders import needs_ids
from tokenreduce.adapters.language.generation import KEYWORD, Run, Step, cache_in, rows_of
from tokenreduce.adapters.language.later import columns_of_mask
from tokenreduce.core.evidence import Attention, Earlier, LanguageEvidence, Prompt
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import DecodeStep, active

__all__ = ["Again", "Site", "check_later", "choose_again", "follow_beams", "last_only", "set_aside"]


#: Steps that are remembered for when a cache is cropped: more than drafts have tokens.
_STEPS = 32


@dataclass(frozen=True)
class Site:
    """A decoder layer in decode: the method that chooses before it, if any; the layer ``since`` which the choice that
    holds here was made; and whether the next layer's method reads this layer's attention."""

    method: Reducer | None
    since: int | None
    reads: bool
    depth: int


@dataclass
class Aside:
    """Features (B,E,C) of tokens that went before a layer, by their place at the entry of the language model; ``here``
    (B,E) marks those that did not come back yet."""

    x: Tensor
    here: Tensor


@dataclass
class Again:
    """What decode steps of one generation remember. Keys of the dictionaries are layers where a method chooses, which
    are those ``at``."""

    at: tuple[int, ...] = ()
    #: The steps before, the last one last, as many as drafts may take back: the new token's column, its attention
    #: (B,L), mean over heads, and which columns it left.
    earlier: dict[int, list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)
    #: (B,S) column of every cache slot from the layer on, -1 for none; only once a token came back there.
    slots: dict[int, Tensor] = field(default_factory=dict)
    aside: dict[int, Aside] = field(default_factory=dict)
    #: Rotary tables of the prompt's columns.
    tables: tuple[Tensor, ...] | None = None

    def revived_at(self, layer: int) -> int | None:
        """The layer since which the choice that holds in ``layer`` was made, where tokens came back."""
        since = max((i for i in self.at if i <= layer), default=None)
        return since if since in self.slots else None

    def crop(self, left: int, slots: dict[int, int]) -> None:
        """Forget columns from ``left`` on; ``slots`` of those that are known stay, from each layer on."""
        self.slots = {k: self.slots[k][:, :n] for k, n in slots.items()}
        self.earlier = {k: [s for s in steps if s[0] < left] for k, steps in self.earlier.items()}

    def reorder(self, rows: Tensor) -> None:
        """Follow beams: row i is what row ``rows[i]`` was."""
        self.earlier = {k: [(c, a[rows], s[rows]) for c, a, s in steps] for k, steps in self.earlier.items()}
        self.slots = {k: s[rows] for k, s in self.slots.items()}
        self.aside = {k: Aside(a.x[rows], a.here[rows]) for k, a in self.aside.items()}


@dataclass
class Pick:
    """The choice that holds from a layer on, in one step: ``live`` (B,C) of all columns. Tokens that came back,
    ``back`` (B,R) columns (-1: none), are in front of the new one, with rotary ``tables`` of all. ``before`` has the
    columns of slots as they were."""

    live: Tensor
    back: Tensor
    tables: tuple[Tensor, ...] | None
    before: Tensor | None
    #: Layers with the same slots share (take, mask, columns).
    made: dict[int, tuple[Tensor | None, Tensor | None, Tensor]] = field(default_factory=dict)


def check_later(acting: list[list[Reducer]], windows: list[int | None], layers: Any) -> None:
    """Raise ``ValueError`` for methods whose decode steps do not go together, or not with the model's attention."""
    every = {id(r): r for here in acting for r in here}
    again = [r for r in every.values() if r.later()]
    if len(again) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in again)} both choose again in decode; choose one")
    if not again:
        return
    first = next(i for i, here in enumerate(acting) if again[0] in here)
    if any(w is not None for w in windows[max(first - 1, 0) :]):
        raise ValueError(
            f"{again[0].spec()} chooses again in decode, which layers with sliding windows are not supported for"
        )
    if again[0].later() != "revive":
        return
    others = [r.spec() for r in every.values() if r is not again[0]]
    if others:
        raise ValueError(
            f"{again[0].spec()} brings tokens back in decode, which {' and '.join(others)} would drop for good in a "
            f"layer behind; set revive=false or leave that out"
        )
    name = implementation(layers[first].self_attn)
    if "flash" in name:
        raise ValueError(
            f"{again[0].spec()} brings tokens back in decode, in steps of several tokens at old positions, for which "
            f"{name} has no mask; set revive=false or call model.set_attn_implementation('sdpa')"
        )


# -- prefill ---------------------------------------------------------------------------------------------------------
def _places(run: Run) -> Tensor:
    """(B,L): place of every column of the prompt at the entry of the language model, 0 for those that are not there."""
    entry = run.cut_at(-1)
    b, n = run.visual.shape
    if entry is None:
        return torch.arange(n, device=run.visual.device).expand(b, -1)
    place = torch.zeros(b, n, dtype=torch.long, device=run.visual.device)
    at = torch.arange(entry.index.shape[1], device=place.device).expand_as(entry.index)
    if entry.valid is None:
        return place.scatter(1, entry.index, at)
    rows, slots = entry.valid.nonzero(as_tuple=True)
    place[rows, entry.index[rows, slots]] = slots
    return place


def _aside(run: Run, layer: int, x: Tensor) -> Aside:
    """What is set aside before ``layer``, made empty at its first use; ``x`` (B,N,C) has the features' type."""
    assert run.again is not None
    if layer not in run.again.aside:
        entry = run.cut_at(-1)
        b, n = run.visual.shape
        n = n if entry is None else entry.index.shape[1]
        none = torch.zeros(b, n, dtype=torch.bool, device=x.device)
        run.again.aside[layer] = Aside(x.new_zeros(b, n, x.shape[-1]), none)
    return run.again.aside[layer]


def set_aside(run: Run, layer: int, x: Tensor, tables: tuple[Tensor, ...], cache: Any) -> None:
    """Keep the features ``x`` (B,N,C) of what the cut at ``layer`` drops, and the rotary ``tables`` of the prompt.

    Raises ``ValueError`` for a ``cache`` that cannot grow.
    """
    assert run.again is not None
    if cache.layers[layer].get_mask_sizes(x.shape[1])[0] > x.shape[1]:
        raise ValueError(
            "a static cache has no slots for tokens that come back in decode; leave cache_implementation at its "
            "default, or set revive=false"
        )
    cut, before = run.cut_at(layer), run.cut_at(layer - 1)
    assert cut is not None
    run.again.tables = tuple(t.detach() for t in tables)
    gone = run.visual_at(layer - 1).clone()
    stays = torch.zeros_like(gone)
    there = torch.ones_like(cut.local, dtype=torch.bool) if cut.valid is None else cut.valid
    rows, slots = there.nonzero(as_tuple=True)
    stays[rows, cut.local[rows, slots]] = True
    rows, at = (gone & ~stays).nonzero(as_tuple=True)
    columns = at if before is None else before.index[rows, at]
    store = _aside(run, layer, x)
    places = _places(run)[rows, columns]
    store.x[rows, places] = x.detach()[rows, at]
    store.here[rows, places] = True


def _reorder(layer: Any, run: Run, beam_idx: Tensor) -> None:
    type(layer).reorder_cache(layer, beam_idx)
    assert run.again is not None
    run.again.reorder(beam_idx.to(run.visual.device))


def follow_beams(cache: Any, run: Run) -> None:
    """Let what a run remembers be reordered with the cache that it belongs to."""
    first = cache.layers[0]
    first.reorder_cache = functools.partial(_reorder, first, run)


# -- decode ----------------------------------------------------------------------------------------------------------
def choose_again(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on a decoder layer, in front of the one that makes masks: in decode, ask the method and show the layer
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


def _columns(run: Run, layer: int, since: int | None, slots: int) -> Tensor:
    """(B,S) column of every one of the first ``slots`` of a layer's cache; -1 for padding and for slots that hold
    none. ``since`` is the layer whose method brings tokens back there, if any."""
    assert run.again is not None
    known = None if since is None else run.again.slots.get(since)
    if known is not None:
        if known.shape[1] != slots:
            raise ValueError(
                f"the cache of layer {layer} holds {slots} tokens where {known.shape[1]} were put; crop the cache as a "
                f"whole (cache.crop), not its layers"
            )
        return known
    cut, (b, length), device = run.cut_at(layer), run.visual.shape, run.visual.device
    if cut is None:
        columns, seen = torch.arange(length, device=device).expand(b, -1), run.mask
    else:
        columns, seen = cut.index, cut.seen
    if seen is not None:
        columns = columns.masked_fill(~seen, -1)
    behind = torch.arange(length, length + slots - columns.shape[1], device=device).expand(b, -1)
    return torch.cat([columns, _real(run, behind)], 1)


def _real(run: Run, columns: Tensor) -> Tensor:
    """Columns (B,M) behind the prompt, -1 where a later turn was padded."""
    if run.later is None:
        return columns
    at = columns - run.length
    known = at < run.later.shape[1]
    padding = ~run.later.gather(1, at.clamp(max=run.later.shape[1] - 1))
    return columns.masked_fill(known & padding, -1)


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
        shown = _columns(run, index - 1, None, filled)
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
    del known[:-_STEPS]
    if method.later() == "revive":
        x, pick = _come_back(step, x, index, live, cache, tables, plan.is_identity)
    else:
        pick = None if plan.is_identity else Pick(live, shown[:, :0], None, None)
    if pick is not None:
        step.picks[index] = pick
    trace = active()
    if trace is not None:
        back = torch.zeros(b, dtype=torch.long, device=device) if pick is None else (pick.back >= 0).sum(1)
        trace.add_decode(layer, DecodeStep(index, method.spec(), live[:, : run.length] & run.visual, back))
    return x


def _row(layer: Any, call: Call, columns: Tensor) -> Tensor:
    """(B,H,1,S) what the new token, the last query, paid to the keys that have ``columns`` (B,S)."""
    assert call.queries is not None
    assert call.keys is not None
    q, k = call.queries[:, :, -1:], call.keys[:, :, : columns.shape[1]]
    call.queries, call.keys, call.values = None, None, None
    scale, softcap = getattr(layer.self_attn, "scaling", None), softcap_of(layer.self_attn)
    return Attention(q, k, scale=scale, softcap=softcap, valid=columns >= 0)("cls")  # of the one query


def _come_back(
    step: Step, x: Tensor, index: int, live: Tensor, cache: Any, tables: tuple[Tensor, ...], all_here: bool
) -> tuple[Tensor, Pick | None]:
    """The tokens of ``live`` (B,C) that the caches from layer ``index`` on lack, in front of the new one. No pick where
    nothing was let go (``all_here``, and none before) and nothing is missing."""
    run, again, total = step.run, step.run.again, live.shape[1]
    assert again is not None
    earlier = step.picks[max(step.picks)] if step.picks else None
    past = int(cache.layers[index].get_seq_length())
    before = _columns(run, index, index, past)
    new = torch.full_like(before[:, :1], total - 1)
    if x.shape[1] > 1 and earlier is not None:  # came back before an earlier layer: some go on, the others stay aside
        rows, at = (earlier.back >= 0).nonzero(as_tuple=True)
        store, places = _aside(run, index, x), _places(run)[rows, earlier.back[rows, at]]
        store.x[rows, places] = x[rows, at]
        store.here[rows, places] = True
    has = torch.zeros(len(live), total + 1, dtype=torch.bool, device=live.device)
    has.scatter_(1, torch.where(before >= 0, before, total), True)
    missing = (live & ~has[:, :total])[:, : run.length]
    count = int(missing.sum(1).max())
    order = missing.long().argsort(dim=1, stable=True)[:, missing.shape[1] - count :]
    back = order.masked_fill(~missing.gather(1, order), -1)
    x = x[:, -1:]
    if not count and all_here and earlier is None and index not in again.slots:
        return x, None
    tables = tuple(t[..., -1:, :] for t in tables)
    if count:
        assert again.tables is not None
        store = again.aside[index]
        places = _places(run).gather(1, order)
        x = torch.cat([store.x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1])), x], 1)
        rows, at = (back >= 0).nonzero(as_tuple=True)
        store.here[rows, places[rows, at]] = False
        tables = tuple(_beside(rows_of(old, order), t) for old, t in zip(again.tables, tables, strict=True))
    if count or index in again.slots:
        again.slots[index] = torch.cat([before, back, new], 1)
    return x, Pick(live, back, tables, before)


def _beside(old: Tensor, new: Tensor) -> Tensor:
    """Rotary tables (B,R,d) of old tokens and (B or 1,1,d) of the new one; (3,B,R,d) in early releases' M-RoPE."""
    return torch.cat([old, new.expand(*old.shape[:-2], 1, old.shape[-1])], -2)


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
        before = _columns(run, index, None, int(cache.layers[index].get_seq_length()))
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
        run.again.slots[index] = torch.cat([_columns(run, index, index, past), _real(run, new)], 1)
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
