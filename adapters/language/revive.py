"""Tokens that an earlier choice let go and that come back in decode, beside the new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.again import Aside, Pick, columns_of_slots
from tokenreduce.adapters.language.generation import Run, Step, rows_of

__all__ = ["aside_at", "come_back", "entry_places", "set_aside"]


def entry_places(run: Run) -> Tensor:
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


def aside_at(run: Run, layer: int, x: Tensor) -> Aside:
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
    store = aside_at(run, layer, x)
    places = entry_places(run)[rows, columns]
    store.x[rows, places] = x.detach()[rows, at]
    store.here[rows, places] = True


def come_back(
    step: Step, x: Tensor, index: int, live: Tensor, cache: Any, tables: tuple[Tensor, ...]
) -> tuple[Tensor, Pick | None]:
    """The tokens of ``live`` (B,C) that the caches from layer ``index`` on lack, in front of the new one. No pick where
    these hold just what is live, as the prefill left it."""
    run, again, total = step.run, step.run.again, live.shape[1]
    assert again is not None
    earlier = step.picks[max(step.picks)] if step.picks else None
    past = int(cache.layers[index].get_seq_length())
    before = columns_of_slots(run, index, index, past)
    new = torch.full_like(before[:, :1], total - 1)
    if x.shape[1] > 1 and earlier is not None:  # came back before an earlier layer: some go on, the others stay aside
        rows, at = (earlier.back >= 0).nonzero(as_tuple=True)
        store, places = aside_at(run, index, x), entry_places(run)[rows, earlier.back[rows, at]]
        store.x[rows, places] = x[rows, at]
        store.here[rows, places] = True
    has = torch.zeros(len(live), total + 1, dtype=torch.bool, device=live.device)
    has.scatter_(1, torch.where(before >= 0, before, total), True)
    missing = (live & ~has[:, :total])[:, : run.length]
    count = int(missing.sum(1).max())
    order = missing.long().argsort(dim=1, stable=True)[:, missing.shape[1] - count :]
    back = order.masked_fill(~missing.gather(1, order), -1)
    x = x[:, -1:]
    if not count and earlier is None and index not in again.slots and not bool((has[:, :total] & ~live).any()):
        return x, None
    tables = tuple(t[..., -1:, :] for t in tables)
    if count:
        assert again.tables is not None
        store = again.aside[index]
        places = entry_places(run).gather(1, order)
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
