"""Evidence of one layer's cache, for a cache-stage method."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import softcap_of
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.records import Frames
from tokenreduce.adapters.language.rotary import Turning
from tokenreduce.adapters.language.site import LayerCall
from tokenreduce.adapters.language.state import Record
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence, Rotary
from tokenreduce.core.plan import take

__all__ = ["CacheView", "Running", "Viewer", "grown"]


@dataclass
class Running(Record):
    """By layer: what is remembered between decode steps: ``scores`` (B*Hkv,N) or (B*Hkv,N,S) of its slots, the last
    ``queries`` (B,H,R,d), how many slots the prompt's plan left, ``prompt_slots`` (B*Hkv,1), and whatever else the
    method keeps of every head, ``memory`` (B*Hkv,M)."""

    scores: Tensor | None = None
    queries: Tensor | None = None
    prompt_slots: Tensor | None = None
    memory: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        def heads_of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.unflatten(0, (len(rows), -1))[rows].flatten(0, 1)

        self.scores, self.prompt_slots = heads_of(self.scores), heads_of(self.prompt_slots)
        self.memory = heads_of(self.memory)
        self.queries = None if self.queries is None else self.queries[rows]


@dataclass(frozen=True, eq=False)
class CacheView:
    """``evidence`` of a layer's cache as it is now, the ``columns`` (B*Hkv,N) of its slots, padding included, and the
    ``order`` (B,N) they were put in, None where they were not."""

    evidence: CacheEvidence
    columns: ColumnIndex
    order: Tensor | None


@dataclass(frozen=True, eq=False)
class _Slots:
    """What a layer holds: ``keys`` and ``values`` (B,Hkv,N,d) of ``columns`` (B,H,N), the ``queries`` (B,Hq,R,d) that
    looked at them, ``rows`` (B or B*Hkv,1,R,N) of the mask that these had, and the keys' tables."""

    keys: Tensor
    values: Tensor
    columns: ColumnIndex
    queries: Tensor | None
    rows: Tensor | None
    rotary: Rotary | None
    order: Tensor | None = None

    def in_order(self) -> _Slots:
        """What is not there in front, so that the last queries of every sample are at the end."""
        there = self.columns.real()
        order = there[:, 0].long().argsort(dim=1, stable=True)
        b, _, n = self.columns.at.shape
        if self.queries is not None and self.queries.shape[2] != n:
            raise ValueError("a padded prompt behind cached columns is padded on the left; set padding_side='left'")
        rows, rotary = self.rows, self.rotary
        if rotary is not None:
            rotary = replace(rotary, cos=take(rotary.cos, order), sin=take(rotary.sin, order))
        if rows is not None:
            rows = rows.expand(b, -1, -1, -1).gather(2, order[:, None, :, None].expand(-1, 1, -1, n))
            rows = rows.gather(3, order[:, None, None, :].expand_as(rows))
        return _Slots(
            _at(self.keys, order), _at(self.values, order),
            self.columns.take(order[:, None].expand_as(self.columns.at)),
            None if self.queries is None else _at(self.queries, order), rows, rotary, order,
        )  # fmt: skip

    def last_queries(self, wanted: int | None) -> _Slots:
        if self.queries is None or wanted is None or wanted >= self.queries.shape[2]:
            return self
        first = self.queries.shape[2] - wanted
        rows = None if self.rows is None else self.rows[:, :, first:]
        return replace(self, queries=self.queries[:, :, first:], rows=rows)


@dataclass(frozen=True, eq=False)
class _Told(Record):
    """What is known of slots whatever they hold: ``visual`` (B,H,N), ``valid`` as evidence takes it, the columns ``at``
    (B*Hkv,N), the number of real tokens ``seen`` (B,1), and what methods found of these marks."""

    visual: Tensor
    valid: Tensor | None
    at: Tensor
    seen: Tensor
    marks: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Viewer:
    """Makes evidence for ``method``, which acts in a language model of ``depth`` layers; ``turning`` is its rotation,
    where the method undoes it, and ``mrope`` says that positions are places in time and image."""

    method: CacheReducer
    depth: int
    turning: Turning | None = None
    mrope: bool = False

    def view(self, call: LayerCall, queries: Tensor | None) -> CacheView:
        """The cache of the layer of ``call`` as it is now, and who looked at it: ``queries`` (B,Hq,R,d).

        Slots of a right-padded prompt are put in order first, what is not there in front: evidence has the last queries
        of every sample at its end.
        """
        forward, prefill = call.forward, call.prefill
        slots = self._slots(call, queries)
        if prefill and slots.columns.there is not None and not bool(slots.columns.there[..., -1].all()):
            slots = slots.in_order()
        if prefill:
            slots = slots.last_queries(self.method.query_rows())
        columns, state = call.columns, call.state.get(Running, call.index)
        heads, n = slots.keys.shape[1:3]
        length, total = columns.length, columns.length if prefill else forward.past + forward.new
        told = self._told(call, slots, total)
        rows = None if slots.queries is None else slots.queries.unflatten(1, (heads, -1)).flatten(0, 1)
        evidence = CacheEvidence(
            slots.keys.flatten(0, 1), slots.values.flatten(0, 1), queries=rows, kv_heads=heads, layer=call.index,
            depth=self.depth, visual=_by_head(told.visual), valid=told.valid, step=total - length,
            scores=None if state is None else grown(state.scores, n), mask=slots.rows, columns=told.at,
            scale=getattr(call.layer.self_attn, "scaling", None), softcap=softcap_of(call.layer.self_attn),
            seen=told.seen, frame_of=self._frames(call, slots.columns.at, told.visual), rotary=slots.rotary,
            prompt_slots=None if state is None else state.prompt_slots, memory=None if state is None else state.memory,
            mrope=self.mrope, marks=told.marks,
        )  # fmt: skip
        return CacheView(evidence, ColumnIndex(told.at), slots.order)

    def _told(self, call: LayerCall, slots: _Slots, total: int) -> _Told:
        """What is known of ``slots``: in a prompt once for all layers behind one cut, of which no key left yet."""
        state, key, (b, heads, n) = call.forward.state, None, slots.keys.shape[:3]
        if call.prefill and call.index not in call.columns.held:
            cut = call.columns.cut_at(call.index)
            key = None if cut is None else cut.layer, heads, n, slots.order is None, slots.keys.device
            if (known := state.get(_Told, key)) is not None:
                return known
        at = slots.columns.at
        told = _Told(
            call.columns.is_visual(slots.columns), _valid(slots.columns), _folded(at, b, heads),
            call.columns.real_count(total),
        )  # fmt: skip
        return told if key is None else state.put(told, key)

    def _slots(self, call: LayerCall, queries: Tensor | None) -> _Slots:
        layer = call.cache.layers[call.index]
        n, filled = layer.keys.shape[2], int(layer.get_seq_length())
        columns = call.columns.of_cache(call.index, filled).part(slice(filled - n, None))
        if queries is not None and queries.shape[2] > n:  # a sliding layer forgot the rest
            queries = queries[:, :, -n:]
        rotary = None if self.turning is None else self.turning.of(call.forward, call.index, call.x)
        if rotary is not None:
            rotary = replace(rotary, cos=rotary.cos[:, -n:], sin=rotary.sin[:, -n:])
        rows = None if queries is None else _rows_of(call.mask, layer.keys.shape[1], queries.shape[2], n)
        return _Slots(layer.keys, layer.values, columns, queries, rows, rotary)

    def _frames(self, call: LayerCall, at: Tensor, visual: Tensor) -> Tensor | None:
        """(B*H,N) number of the frame of a slot, counted over the videos of a sample; -1 elsewhere."""
        known = call.state.get(Frames) if "frames" in self.method.required() else None
        if known is None:
            return None
        where = at.clamp(max=call.columns.length - 1).flatten(1)
        frames = known.of.gather(1, where[..., None].expand(-1, -1, 4))
        video, first = frames[..., 0], frames[..., 1]
        number = torch.where(video < 0, -1, video.clamp(min=0) * 100_000 + first).view_as(at)
        return _by_head(number.masked_fill(~visual, -1))


def _rows_of(mask: Any, heads: int, queries: int, n: int) -> Tensor | None:
    """(B or B*Hkv,1,R,N) of an attention mask, the rows of the last queries and the last ``n`` slots."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    rows = mask if mask.shape[1] == 1 else mask[:, :: mask.shape[1] // heads].flatten(0, 1).unsqueeze(1)
    return rows[:, :, mask.shape[2] - min(queries, mask.shape[2]) :, mask.shape[3] - n :]


def _at(t: Tensor, order: Tensor) -> Tensor:
    """(B,H,N,d) in another order (B,N)."""
    return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


def _by_head(t: Tensor) -> Tensor:
    """(B,H,N) as evidence takes it: (B,N) where all heads have the same, else (B*H,N)."""
    return t[:, 0] if t.shape[1] == 1 else t.flatten(0, 1)


def _folded(t: Tensor, batch: int, heads: int) -> Tensor:
    """(B*Hkv,N) of (B,H,N)."""
    return t.expand(batch, heads, -1).flatten(0, 1)


def _valid(columns: ColumnIndex) -> Tensor | None:
    if columns.there is None or bool(columns.there.all()):
        return None
    return _by_head(columns.there)


def grown(scores: Tensor | None, n: int) -> Tensor | None:
    """Running scores with 0 for slots that came since."""
    if scores is None or scores.shape[1] == n:
        return scores
    return torch.cat([scores, scores.new_zeros(scores.shape[0], n - scores.shape[1], *scores.shape[2:])], 1)
