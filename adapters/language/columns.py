"""Which columns of a generation every layer holds, and the only place where columns, slots and image tokens meet.

The caller's columns are those of the prompt and one for every later token. A layer holds some of them: those that the
last cut at or before it left, less what went from its cache, and what came back in decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.cuts import Cut, count_sizes, slots_kept
from tokenreduce.adapters.language.held import Held
from tokenreduce.adapters.language.indices import ColumnIndex, SlotIndex, TokenIndex
from tokenreduce.core.constants import positions
from tokenreduce.core.plan import Plan, Prune

__all__ = ["Columns", "Views", "slots_of"]


@dataclass
class Columns:
    """``visual`` (B,L) marks the visual columns of a prompt of L columns, ``real`` (B,L) those that are no padding
    (None: all); the first ``front``, all text, were in the cache before."""

    visual: Tensor
    real: Tensor | None = None
    front: int = 0
    #: What chose which columns are left, for messages.
    chosen_by: str = ""
    #: (B,M) which of the first M columns behind the prompt are no padding; None where all are.
    real_behind: Tensor | None = None
    cuts: list[Cut] = field(default_factory=list)
    #: Layers whose cache was thinned.
    held: dict[int, Held] = field(default_factory=dict)
    #: Layers where a method chooses in decode -> (B,S) what each slot holds from there on, None until tokens came back.
    revived: dict[int, ColumnIndex | None] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Columns of the prompt, L."""
        return self.visual.shape[1]

    @property
    def reduced(self) -> bool:
        """Whether some layer holds less than all columns."""
        return bool(self.cuts or self.held)

    @property
    def plain(self) -> bool:
        """Whether a new token sees all that every layer holds: there is no padding, nothing came back in decode, and no
        key counts more than others."""
        return (
            self.real_behind is None
            and not self.revived
            and all(cut.seen is None and cut.bias is None for cut in self.cuts)
            and all(held.columns.there is None and held.bias is None for held in self.held.values())
        )

    # -- what is left in prefill -------------------------------------------------------------------------------------
    def cut_at(self, layer: int) -> Cut | None:
        """The cut that holds in ``layer``: the last one at or before it; -1 is before the language model."""
        for cut in reversed(self.cuts):  # asked in every layer of every step
            if cut.layer <= layer:
                return cut
        return None

    def cut(self, layer: int, plan: Plan, power: float = 0.0) -> Cut:
        """Drop columns from ``layer`` on; ``plan`` is on the columns that an earlier cut left, and of those only on
        what the prompt's own call brings. Keys of merged tokens count by their sizes to the ``power``, from here on."""
        local, before = slots_kept(plan), self.cut_at(layer)
        index, valid = local.at, local.there
        if self.front:
            ahead = torch.arange(self.front, device=index.device).expand(len(index), -1)
            index = torch.cat([ahead, index + self.front], 1)
            valid = None if valid is None else torch.cat([torch.ones_like(ahead, dtype=torch.bool), valid], 1)
        left = ColumnIndex(index, valid)
        if before is not None:
            there = None if before.columns.there is None else before.columns.there.gather(1, index)
            left = ColumnIndex(before.columns.at.gather(1, index), valid).only(there)
        seen = left.there
        if self.real is not None:
            padding = self.real.gather(1, left.at)
            seen = padding if seen is None else seen & padding
        made = Cut(layer, left, local, seen, None if isinstance(plan, Prune) else plan, self.front)
        count_sizes(made, before, plan, power)
        self.cuts.append(made)
        return made

    def real_at(self, layer: int) -> Tensor | None:
        """(B,K) which of the slots that ``layer`` sees in prefill are real tokens; None where all are."""
        cut = self.cut_at(layer)
        return self.real if cut is None else cut.seen

    def tell(self, told: Tensor, layer: int, blank: int = 0) -> Tensor:
        """(B,L) or (B,L,n), what is known of every column, of the slots that ``layer`` sees in prefill; ``blank`` for
        those that are not there."""
        cut = self.cut_at(layer)
        if cut is None:
            return told
        at, there = cut.columns.at, cut.columns.there
        if told.dim() == 2:
            told = told.gather(1, at)
            return told if there is None else told.masked_fill(~there, blank)
        told = told.gather(1, at.unsqueeze(-1).expand(-1, -1, told.shape[-1]))
        return told if there is None else told.masked_fill(~there.unsqueeze(-1), blank)

    def visual_at(self, layer: int) -> Tensor:
        """(B,K) which of the slots that ``layer`` sees in prefill are visual tokens."""
        cut = self.cut_at(layer)
        if cut is None:
            return self.visual
        visual = self.visual.gather(1, cut.columns.at)
        return visual if cut.columns.there is None else visual & cut.columns.there

    def choosable_at(self, layer: int) -> Tensor:
        """(B,K) :meth:`visual_at` without the last real token of a row: what comes next is predicted from it, also
        where a prompt ends in an image."""
        visual, real = self.visual_at(layer), self.real_at(layer)
        slot = torch.arange(visual.shape[1], device=visual.device)
        last = slot[-1:] if real is None else slot.where(real, -1).amax(1, keepdim=True)
        return visual & (slot != last)

    def slots_at(self, layer: int) -> SlotIndex:
        """(B,L) the slot of every column in the sequence that ``layer`` sees in prefill, -1 of those that are gone."""
        cut, (batch, length) = self.cut_at(layer), self.visual.shape
        if cut is None:
            return SlotIndex(torch.arange(length, device=self.visual.device).expand(batch, -1))
        return slots_of(cut.columns, length)

    # -- what caches hold --------------------------------------------------------------------------------------------
    def of_slots(self, layer: int, total: int) -> ColumnIndex:
        """(B,T) what the first ``total`` slots behind the cut at ``layer`` hold, padding included, whether they are
        filled yet or not."""
        cut, (batch, length), device = self.cut_at(layer), self.visual.shape, self.visual.device
        if cut is None:
            return ColumnIndex(positions(total, self.visual).expand(batch, -1))
        behind = torch.arange(length, length + max(total - cut.k, 0), device=device).expand(batch, -1)
        return cut.columns.then(ColumnIndex(behind)).part(slice(total))

    def of_layer(self, layer: int, slots: int) -> ColumnIndex:
        """(B,S) what the ``slots`` of a layer hold whose heads all hold the same, without padding.

        Raises ``ValueError`` for a cache of which single layers were cropped.
        """
        known = self.revived_at(layer)
        if known is None:
            return self.without_padding(self.of_slots(layer, slots))
        if known.k != slots:
            raise ValueError(
                f"the cache of layer {layer} holds {slots} tokens where {known.k} were put; crop the cache as a "
                f"whole (cache.crop), not its layers"
            )
        return known

    def of_cache(self, layer: int, total: int) -> ColumnIndex:
        """(B,H,T) what the first ``total`` slots of ``layer`` hold, without padding, whatever left it; H is 1 where
        all heads hold the same."""
        held = self.held.get(layer)
        if held is not None:
            return self.without_padding(held.slots(total))
        mine = self.of_slots(layer, total)
        return self.without_padding(
            ColumnIndex(mine.at.unsqueeze(1), None if mine.there is None else mine.there.unsqueeze(1))
        )

    def without_padding(self, columns: ColumnIndex) -> ColumnIndex:
        """``columns``, those of the prompt and of later turns that are padding not there."""
        if self.real is None and self.real_behind is None:
            return columns
        parts = [torch.ones_like(self.visual) if self.real is None else self.real]
        parts += [] if self.real_behind is None else [self.real_behind]
        known = torch.cat([*parts, parts[0].new_ones(len(self.visual), 1)], 1)
        at = columns.at.clamp(max=known.shape[1] - 1)
        return columns.only(known.gather(1, at.flatten(1)).view_as(at))

    def revived_at(self, layer: int) -> ColumnIndex | None:
        """(B,S) what each slot of ``layer`` holds, where tokens came back in decode."""
        since = max((i for i in self.revived if i <= layer), default=None)
        return None if since is None else self.revived[since]

    def is_visual(self, columns: ColumnIndex) -> Tensor:
        """Which of ``columns`` (B,T) or (B,H,T) are visual tokens of the prompt."""
        at = columns.at.clamp(max=self.length - 1)
        visual = self.visual.gather(1, at.flatten(1)).view_as(at) & (columns.at < self.length)
        return visual if columns.there is None else visual & columns.there

    # -- counting ----------------------------------------------------------------------------------------------------
    def given(self, cached: Any, layer: int = 0) -> Any:
        """Tokens that the caller gave when ``layer`` has ``cached`` of them: more, where tokens went before it."""
        if (held := self.held.get(layer)) is not None:
            return held.upto + cached - held.k
        cut = self.cut_at(layer)
        return cached if cut is None else cached + self.length - cut.k

    def real_count(self, total: int) -> Tensor:
        """(B,1) how many of the first ``total`` columns are no padding."""
        count = torch.full((len(self.visual), 1), total, device=self.visual.device)
        for real in (self.real, self.real_behind):
            if real is not None:
                count = count - (~real).sum(1, keepdim=True)
        return count

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
        if (known := self.revived_at(layer)) is not None:
            return known.k - self._slots_before(layer, known, left)
        return self._cut_behind(layer, left, past)

    def _cut_behind(self, layer: int, left: int, past: int) -> int:
        cut = self.cut_at(layer)
        if cut is None or left >= self.length:
            return past - left
        behind = cut.columns.at >= left
        counts = set((behind if cut.columns.there is None else behind & cut.columns.there).sum(1).tolist())
        if len(counts) > 1:
            raise ValueError(
                f"layer {layer} keeps {sorted(counts)} of the columns from {left} on, another number in every row, so "
                f"that no crop leaves {left}; crop to {self.length} or more, or one row at a time"
            )
        return past - self.length + counts.pop()

    def _slots_before(self, layer: int, known: ColumnIndex, left: int) -> int:
        """How many slots of ``layer``, where tokens came back, were filled when it held the first ``left`` columns.
        What came back with a later token goes with that, and may come back again."""
        new = (known.real() & (known.at >= self.length) & (known.at < left)).any(0).nonzero()
        if len(new):
            return int(new[-1]) + 1
        cut = self.cut_at(layer)
        filled = self.length if cut is None else cut.k
        return filled - (self._cut_behind(layer, left, self.length) if left < self.length else 0)

    # -- changes -----------------------------------------------------------------------------------------------------
    def crop(self, left: int) -> None:
        """Forget all columns but the first ``left``."""
        if self.real_behind is not None:
            self.real_behind = self.real_behind[:, : left - self.length] if left > self.length else None
        for layer, known in self.revived.items():
            if known is not None:
                self.revived[layer] = known.part(slice(self._slots_before(layer, known, left)))
        for layer, held in self.held.items():
            held.crop(layer, left)
        if left >= self.length:
            return
        for cut in self.cuts:
            cut.crop(cut.k - self._cut_behind(cut.layer, left, self.length))
        self.visual = self.visual[:, :left]
        self.real = None if self.real is None else self.real[:, :left]

    def reorder(self, rows: Tensor) -> None:
        """Follow beams of one prompt: row i is what row ``rows[i]`` was."""
        for held in self.held.values():
            held.reorder(rows)
        self.revived = {i: None if known is None else known.rows(rows) for i, known in self.revived.items()}


def slots_of(columns: ColumnIndex, length: int) -> SlotIndex:
    """(B,L) which of the K slots that hold ``columns`` (B,K) has each of ``length`` columns, -1 where none has."""
    slot = torch.arange(columns.k, device=columns.at.device).expand_as(columns.at)
    to = columns.at if columns.there is None else torch.where(columns.there, columns.at, length)
    out = columns.at.new_full((len(columns.at), length + 1), -1).scatter(1, to, slot)[:, :length]
    return SlotIndex(out, out >= 0)


@dataclass(frozen=True, eq=False)
class Views:
    """Where the N tokens of P views stand in a prompt: ``rows`` (P,1) of the batch, ``columns`` (P,N)."""

    rows: Tensor
    columns: Tensor

    @property
    def n(self) -> int:
        return self.columns.shape[1]

    def of(self, tokens: TokenIndex) -> ColumnIndex:
        """The columns of ``tokens`` (P,K)."""
        return ColumnIndex(self.columns.gather(1, tokens.at.clamp(min=0, max=self.n - 1)), tokens.there)

    def read(self, table: Tensor) -> Tensor:
        """(P,N) or (P,N,n) of what ``table`` (B,L) or (B,L,n) says of the tokens."""
        return table[self.rows, self.columns]

    def write(self, table: Tensor, at: ColumnIndex, values: Tensor | bool) -> None:
        """Let ``table`` (B,L) or (B,L,n) say ``values`` (P,K) or (P,K,n) of the columns ``at`` (P,K), in place."""
        where = at.real().nonzero(as_tuple=True)
        table[self.rows.expand_as(at.at)[where], at.at[where]] = values[where] if isinstance(values, Tensor) else values

    def embeddings(self, x: Tensor) -> Tensor:
        """(P,N,D) of ``x`` (B,L,D), copied by whole rows."""
        where = self.rows * x.shape[1] + self.columns
        return x.flatten(0, 1).index_select(0, where.flatten()).view(*where.shape, -1)
