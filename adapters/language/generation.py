"""One generation of a language model with fewer tokens: what was dropped from which layer on, and the masks of it.

Three index spaces meet in a prompt: visual tokens, columns of the prompt as the caller sees it, and slots of a layer's
cache after tokens were dropped. :class:`Run` maps between them and nothing else does. A run travels with the calls of
its generation as a keyword argument and, between steps, as an attribute of the cache object, so interleaved
generations and threads never mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.held import Held
from tokenreduce.core.plan import Plan, Prune, take

__all__ = [
    "KEYWORD", "Cut", "Deep", "Run", "Step", "attach_run", "cache_as", "cache_in", "cache_of", "columns_kept",
    "is_known", "rows_of", "run_of",
]  # fmt: skip

#: Keyword under which a step travels through the model's kwargs, and attribute of the cache between steps.
KEYWORD = "tokenreduce_step"
_ON_CACHE = "_tokenreduce_run"


def columns_kept(plan: Plan) -> tuple[Tensor, Tensor | None]:
    """``(index, valid)`` of a plan over columns: (B,K) ascending, empty slots on the left."""
    index, valid, order = plan.representatives(), plan.validity(), columns_order(plan)
    return index.gather(1, order), None if valid is None else valid.gather(1, order)


def columns_order(plan: Plan) -> Tensor:
    """(B,K): which output of a plan comes at each place of :func:`columns_kept`."""
    index, valid = plan.representatives(), plan.validity()
    return (index if valid is None else torch.where(valid, index, index - plan.n)).argsort(dim=1, stable=True)


@dataclass
class Cut:
    """From ``layer`` on, only the prompt columns ``index`` (B,K) are left; ``valid`` marks real slots."""

    layer: int
    index: Tensor
    valid: Tensor | None
    #: (B,K) the same tokens among those that an earlier cut left.
    local: Tensor
    #: (B,K) whether a slot may be attended to, padding included; None when all may.
    seen: Tensor | None = None
    #: What makes the features of the columns, where that is more than taking them.
    plan: Plan | None = None
    #: How many of the columns an earlier call put into the cache, in front of this prompt's.
    front: int = 0
    #: (B,K) how many tokens each slot stands for, and what that adds to the logits of its key; None where nothing.
    size: Tensor | None = None
    bias: Tensor | None = None

    @property
    def here(self) -> Tensor:
        """(B,K) :attr:`index` among the columns that the prompt's own call brings."""
        return self.index[:, self.front :] - self.front if self.front else self.index

    def take(self, x: Tensor) -> Tensor:
        """Features (B,N,C) of the columns that an earlier cut left, to (B,K,C)."""
        where = self.local
        if self.plan is not None:
            x, where = self.plan.reduce(x), columns_order(self.plan)
        return take(x, where)


def _count(made: Cut, before: Cut | None, plan: Plan, power: float) -> None:
    """Note in ``made`` how many tokens its slots stand for, and what that adds to the logits of their keys."""
    sizes = None if before is None else before.size
    if sizes is None and not power:
        return
    here = None if sizes is None else sizes[:, made.front :]
    order = columns_order(plan)
    if power:
        size = plan.reduce_size(here)
        if size is None:
            return
        size = size.gather(1, order).clamp(min=1)
        bias = size.log() * power
    else:  # a method that counts none: what stands here keeps what it counted
        assert before is not None
        held = [t[:, made.front :] for t in (before.size, before.bias) if t is not None]
        size, bias = (plan.gather(t).gather(1, order) for t in held)
    if made.front:
        ahead = torch.ones(len(size), made.front, dtype=size.dtype, device=size.device)
        size, bias = torch.cat([ahead, size], 1), torch.cat([ahead * 0, bias], 1)
    made.size, made.bias = size, bias


@dataclass
class Run:
    """State of one generation. ``length`` L is the prompt's number of columns, ``mask`` (B,L) its padding or None;
    ``front`` of them, all text, were in the cache before."""

    length: int
    visual: Tensor
    mask: Tensor | None
    cuts: list[Cut] = field(default_factory=list)
    calls: dict[int, Any] = field(default_factory=dict)
    #: Layers whose plan is made: gradient checkpointing runs a layer again, and must get the same tokens.
    decided: set[int] = field(default_factory=set)
    #: (B,M) padding of the first M columns after the prompt (a later turn may be padded); None when there is none.
    later: Tensor | None = None
    #: (B,1) what positions after the prompt are less than the caller's, where they are compact.
    shift: Tensor | None = None
    #: (B,L,C) features before layer 0, while a method still needs them.
    entered: Tensor | None = None
    #: Layer -> (B,K,C) what entered the one before, until its method has chosen.
    inputs: dict[int, Tensor] = field(default_factory=dict)
    #: (B,L,4) video, first and last frame, and place of every column, see
    #: :attr:`tokenreduce.core.evidence.Evidence.films`.
    films: Tensor | None = None
    #: (B,L,6) where in its image every column is, see
    #: :class:`~tokenreduce.core.evidence.LanguageEvidence`.
    places: Tensor | None = None
    #: Method -> (B,L) what it marked by what the vision tower saw, see :meth:`tokenreduce.Reducer.tower_scores`.
    marks: dict[Any, Tensor] = field(default_factory=dict)
    #: (B,K,C) what enters a layer, where tokens left in the middle of the layer before.
    middles: dict[int, Tensor] = field(default_factory=dict)
    #: What decode steps remember where a method chooses in them, an
    #: :class:`~tokenreduce.adapters.language.decode.Again`.
    again: Any = None
    #: What layers hold whose keys were thinned out, and what cache-stage methods remember of them.
    held: dict[int, Held] = field(default_factory=dict)
    running: dict[int, Any] = field(default_factory=dict)
    #: Layer -> what is kept of it until the last layer's prefill.
    summaries: dict[int, Any] = field(default_factory=dict)
    front: int = 0
    #: What chose, and how many columns the hooks of its model have seen so far.
    methods: str = ""
    given: int = 0

    def columns(self, cached: Any, layer: int = 0) -> Any:
        """Tokens that the caller gave when ``layer`` has ``cached`` of them: more, where tokens went before it."""
        if (held := self.held.get(layer)) is not None:
            return held.upto + cached - held.k
        cut = self.cut_at(layer)
        return cached if cut is None else cached + self.length - cut.index.shape[1]

    def check_batch(self, rows: int) -> None:
        """Raise ``ValueError`` for a cache that now has other rows."""
        if rows != self.visual.shape[0]:
            raise ValueError(
                f"the cache was made for a batch of {self.visual.shape[0]} and is used for {rows}; caches of a patched "
                f"model are not repeated or thinned out: give the prompt once per row (num_return_sequences does)"
            )

    def slots_behind(self, layer: int, left: int, past: int) -> int:
        """How many of the last slots of ``layer`` hold columns from ``left`` on, of ``past`` columns in all.

        Raises ``ValueError`` where that is not the same number in every row.
        """
        if (held := self.held.get(layer)) is not None:
            return held.slots_behind(layer, left, past)
        cut = self.cut_at(layer)
        if cut is None or left >= self.length:
            return past - left
        behind = cut.index >= left if cut.valid is None else (cut.index >= left) & cut.valid
        counts = set(behind.sum(1).tolist())
        if len(counts) > 1:
            raise ValueError(
                f"layer {layer} keeps {sorted(counts)} of the columns from {left} on, another number in every row, so "
                f"that no crop leaves {left}; crop to {self.length} or more, or one row at a time"
            )
        return past - self.length + counts.pop()

    @property
    def reduced(self) -> bool:
        """Whether some layer holds less than all columns."""
        return bool(self.cuts or self.held)

    def crop(self, left: int) -> None:
        """Forget all columns but the first ``left``."""
        if self.later is not None:
            self.later = self.later[:, : left - self.length] if left > self.length else None
        for layer, held in self.held.items():
            held.crop(layer, left)
        if left >= self.length:
            return
        entry = self.cut_at(-1)
        if self.shift is not None and entry is not None:
            self.shift = self.shift - (self.length - left - self.slots_behind(-1, left, self.length))
        for cut in self.cuts:
            k = cut.index.shape[1] - self.slots_behind(cut.layer, left, self.length)
            cut.index, cut.local = cut.index[:, :k], cut.local[:, :k]
            cut.valid = None if cut.valid is None else cut.valid[:, :k]
            cut.seen = None if cut.seen is None else cut.seen[:, :k]
            cut.bias = None if cut.bias is None else cut.bias[:, :k]
        self.length, self.visual = left, self.visual[:, :left]
        self.mask = None if self.mask is None else self.mask[:, :left]

    def reorder(self, beam_idx: Tensor) -> None:
        """Follow beams of one prompt: what is remembered of row i is what row ``beam_idx[i]`` did."""
        rows = beam_idx.to(self.visual.device)
        for kept in (self.again, *self.held.values(), *self.running.values()):
            if kept is not None:
                kept.reorder(rows)

    def slot_columns(self, layer: int, total: int) -> tuple[Tensor, Tensor]:
        """(B,T) column of each of the first ``total`` slots of ``layer``, whether they are filled yet or not, and
        which are there at all."""
        cut = self._cut(layer)
        b, k = cut.index.shape
        behind = torch.arange(self.length, self.length + max(total - k, 0), device=cut.index.device).expand(b, -1)
        there = torch.ones_like(cut.index, dtype=torch.bool) if cut.valid is None else cut.valid
        there = torch.cat([there, torch.ones_like(behind, dtype=torch.bool)], 1)
        return torch.cat([cut.index, behind], 1)[:, :total], there[:, :total]

    def cut_at(self, layer: int) -> Cut | None:
        """The cut that holds in ``layer``: the last one at or before it."""
        held = [c for c in self.cuts if c.layer <= layer]
        return held[-1] if held else None

    def cut(self, layer: int, plan: Plan, power: float = 0.0) -> Cut:
        """Drop columns from ``layer`` on (-1: before the language model); ``plan`` indexes the columns that an
        earlier cut left, and of those only what the prompt's own call brings. Keys of merged tokens count by their
        sizes to the ``power``, from here on."""
        index, valid = columns_kept(plan)
        local, before = index, self.cut_at(layer)
        if self.front:
            ahead = torch.arange(self.front, device=index.device).expand(len(index), -1)
            index = torch.cat([ahead, index + self.front], 1)
            valid = None if valid is None else torch.cat([torch.ones_like(ahead, dtype=torch.bool), valid], 1)
        if before is not None:
            if before.valid is not None:
                mine = before.valid.gather(1, index)
                valid = mine if valid is None else valid & mine
            index = before.index.gather(1, index)
        seen = valid
        if self.mask is not None:
            padding = self.mask.gather(1, index)
            seen = padding if seen is None else seen & padding
        made = Cut(layer, index, valid, local, seen, None if isinstance(plan, Prune) else plan, self.front)
        _count(made, before, plan, power)
        self.cuts.append(made)
        return made

    def column_mask(self, layer: int) -> Tensor | None:
        """(B,K) which of the slots that ``layer`` sees in prefill are real tokens."""
        cut = self.cut_at(layer)
        return self.mask if cut is None else cut.seen

    def visual_at(self, layer: int) -> Tensor:
        """(B,K) which of the slots that ``layer`` sees in prefill are visual tokens."""
        cut = self.cut_at(layer)
        if cut is None:
            return self.visual
        visual = self.visual.gather(1, cut.index)
        return visual if cut.valid is None else visual & cut.valid

    def choosable_at(self, layer: int) -> Tensor:
        """(B,K) :meth:`visual_at` without the last real token of a row: what comes next is predicted from it, also
        where a prompt ends in an image."""
        visual, real = self.visual_at(layer), self.column_mask(layer)
        slot = torch.arange(visual.shape[1], device=visual.device)
        last = slot[-1:] if real is None else slot.where(real, -1).amax(1, keepdim=True)
        return visual & (slot != last)

    def films_at(self, layer: int) -> Tensor | None:
        """(B,K,4) :attr:`films` of the slots that ``layer`` sees in prefill."""
        return self._told(self.films, layer)

    def places_at(self, layer: int) -> Tensor | None:
        """(B,K,6) :attr:`places` of the slots that ``layer`` sees in prefill."""
        return self._told(self.places, layer)

    def _told(self, told: Tensor | None, layer: int) -> Tensor | None:
        """(B,L,n) numbers of columns for the slots that ``layer`` sees, -1 for those that are not there."""
        cut = self.cut_at(layer)
        if cut is None or told is None:
            return told
        told = told.gather(1, cut.index.unsqueeze(-1).expand(-1, -1, told.shape[-1]))
        return told if cut.valid is None else told.masked_fill(~cut.valid.unsqueeze(-1), -1)

    def marks_at(self, layer: int, method: Any) -> Tensor:
        """(B,K) :attr:`marks` of a method on the slots that ``layer`` sees in prefill."""
        cut, marks = self.cut_at(layer), self.marks[method]
        if cut is None:
            return marks
        marks = marks.gather(1, cut.index)
        return marks if cut.valid is None else marks.masked_fill(~cut.valid, 0)

    def decode_mask(
        self, layer: int, past: int, queries: int, slots: int, offset: int = 0, window: int | None = None
    ) -> Tensor | None:
        """(B,1,Q,S) bool for ``layer`` in decode: its cache took in ``past`` tokens and shows S ``slots``, filled or
        not, the first of which holds token ``offset`` (sliding caches forget). A ``window`` counts columns of the
        unreduced sequence, as the model would without us.

        None when everything may be seen.
        """
        cut = self._cut(layer)
        near = window is None or self.length + past - cut.index.shape[1] < window
        if cut.seen is None and self.later is None and queries == 1 and slots == past + 1 and near:
            return None
        k, device = cut.index.shape[1], cut.index.device
        slot = torch.arange(offset, offset + slots, device=device)
        row = past + torch.arange(queries, device=device)[:, None]
        mask = (self._slots_seen(cut, offset + slots)[:, None, None, offset:]) & (slot <= row)
        if window is not None:
            later = torch.arange(self.length, self.length + max(offset + slots - k, 0), device=device)
            column = torch.cat([cut.index, later.expand(cut.index.shape[0], -1)], 1)[:, None, None, offset:]
            mask = mask & (self.length + row - k - column < window)
        return mask

    def flash_mask(self, layer: int, filled: int, slots: int) -> Tensor | None:
        """(B,F) padding mask for implementations that take no other, in prefill and decode; F ``filled`` of the S
        ``slots`` hold a token after this call. None when everything may be seen."""
        cut = self._cut(layer)
        plain = cut.seen is None and self.later is None and slots == filled
        return None if plain else self._slots_seen(cut, filled)

    def _cut(self, layer: int) -> Cut:
        cut = self.cut_at(layer)
        assert cut is not None
        return cut

    def _slots_seen(self, cut: Cut, total: int) -> Tensor:
        """(B,total) which slots may be attended to as far as padding goes: the prompt's, then those of new tokens."""
        batch, k = cut.index.shape
        parts = [torch.ones(batch, k, dtype=torch.bool, device=cut.index.device) if cut.seen is None else cut.seen]
        if self.later is not None:
            parts.append(self.later[:, : max(total - k, 0)])
        known = torch.cat(parts, 1)
        return torch.cat([known, known.new_ones(batch, max(total - known.shape[1], 0))], 1)


@dataclass(frozen=True)
class Deep:
    """DeepStack (Qwen3-VL): visual features (n_visual,C) that are added before a layer, for the layers behind a cut.

    ``mask`` (B,L) marks their columns; ``features[layer]`` are in the order of its True entries.
    """

    mask: Tensor
    features: dict[int, Tensor]

    def add(self, x: Tensor, layer: int, cut: Cut | None) -> Tensor:
        """``x`` (B,N,C) with the features of ``layer`` added to the visual tokens that ``cut`` left."""
        rows = self.features.get(layer)
        if rows is None:
            return x
        here = self.mask.to(x.device)
        number = (here.flatten().cumsum(0) - 1).clamp(min=0).view_as(here)
        if cut is not None:
            here, number = here.gather(1, cut.here), number.gather(1, cut.here)
        return torch.where(here.unsqueeze(-1), x + rows.to(x.device, x.dtype)[number], x)


@dataclass(frozen=True)
class Step:
    """One call of the model within a run, and the ``newline`` embedding that the model puts at row ends of an image."""

    run: Run
    prefill: bool
    deep: Deep | None = None
    #: In decode: tokens per sample that come new, and columns that there were before.
    new: int = 0
    past: int = 0
    #: Whether the caller says for every new token what it sees (a 4-D mask on a cache that grows).
    masked: bool = False
    newline: Tensor | None = None
    #: Positions of the prompt's columns, where a method asks for rotary tables.
    positions: Tensor | None = None
    #: Masks that are made, for the layers that need the same.
    masks: dict[Any, Tensor | None] = field(default_factory=dict)
    #: Rotary tables of the columns that a cut left, and the stock ones they are from.
    tables: dict[Any, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=dict)
    #: "image", "video" -> what the vision tower saw, and (B,L) which columns are theirs.
    encoded: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, Tensor] = field(default_factory=dict)
    #: (B,L) which feature of a call of the tower each column holds, -1 for none, where that is known column by column.
    places: dict[str, Tensor] = field(default_factory=dict)
    #: (B,L) the prompt's tokens, None when embeddings were given.
    ids: Tensor | None = None
    #: Rows and columns of row ends that go.
    dropped: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    #: In decode: what a method chose before a layer, and the columns whose keys a layer saw.
    picks: dict[int, Any] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)


def rows_of(table: Tensor, where: Tensor) -> Tensor:
    """Rows of ``table`` (B or 1,L,d) at the columns ``where`` (B,K); (3,B,L,d) where layers mix M-RoPE themselves, as
    in early releases."""
    if table.dim() == 4:
        return torch.stack([rows_of(t, where) for t in table])
    if table.shape[0] == 1:  # one table for all rows; whole rows are copied much faster than numbers are gathered
        return table[0].index_select(0, where.flatten()).unflatten(0, where.shape)
    return take(table, where)


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def cache_as(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of ``model``, under the name that its release knows."""
    known = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output carries, under either of its names."""
    return output["cache" if "cache" in output else "past_key_values"]


def run_of(cache: Any) -> Run | None:
    """The run that a cache belongs to."""
    return getattr(cache, _ON_CACHE, None)


def is_known(cache: Any) -> bool:
    """Whether a patched model has seen ``cache`` before."""
    return hasattr(cache, _ON_CACHE)


def attach_run(cache: Any, run: Run | None) -> None:
    setattr(cache, _ON_CACHE, run)
