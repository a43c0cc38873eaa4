"""Evidence at the cache stage: keys and values of one layer of a language model, whose KV heads are rows of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenreduce.core.evidence.attention import need
from tokenreduce.core.plan import take

__all__ = ["CacheEvidence", "Rotary"]

T = TypeVar("T")

#: Rows of attention that are computed at once where a method sums over many of them: bounds memory, N x N never exists.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary tables of a layer: ``cos`` and ``sin`` (B,N,r) of the cached slots, ``ahead(f)`` those (B,f,r) of the next
    f positions. ``paired``: neighbouring channels turn together (GLM, Cohere), instead of the two halves."""

    cos: Tensor
    sin: Tensor
    ahead: Callable[[int], tuple[Tensor, Tensor]]
    paired: bool = False

    def by_channel(self, table: Tensor) -> Tensor:
        """``table`` with the same number for both channels that turn together, so that a rotation is ``x * cos +
        turned(x) * sin`` in either layout. GLM's tables have halves alike although its channels turn in pairs."""
        half = table.shape[-1] // 2
        if self.paired and torch.equal(table[..., :half], table[..., half:]):
            return table[..., :half].repeat_interleave(2, -1)
        return table


class CacheEvidence:
    """What a method of the cache stage may look at: one layer's cached keys and values, and who attended to them.

    The B samples have Hkv KV heads each, folded into B*Hkv rows (row b*Hkv+h is head h of sample b). N slots are in the
    order of their columns. Evidence is read, never written to; asking for what is missing raises ``ValueError``.

    Args:
        keys, values: (B*Hkv,N,d) as cached, keys behind their rotation.
        attention: (B*Hkv,G,R,N) causal softmax rows of the last R queries, G query heads for each KV head; in decode
            R=1.
        queries: (B*Hkv,G,R,d) the last R queries, instead of ``attention``; rows are then computed when asked for.
        kv_heads: Hkv.
        visual: (B,N) bool, per sample: which slots hold visual tokens of the prompt.
        valid: (B,N) bool, per sample: slots that are there. Padding is not, is never kept and counts nowhere. Also
            (B*Hkv,N), where an earlier plan left the heads unequal numbers.
        scores: (B*Hkv,N) or (B*Hkv,N,S) what ``score`` returned in the step before, gathered by the plans since;
            columns that came later have 0.
        layer, depth: 0-based layer and number of layers.
        step: 0 at the prompt, then the number of the decode step.
        scale, softcap: of the model's logits; 1/sqrt(d) and none by default.
        mask: (B or 1,1,R,N) or (B*Hkv,1,R,N) bool or additive, what the last R queries see in the model, instead of
            causal order.
        columns: (B*Hkv,N) column of every slot in the sequence as the caller sees it; 0 to N-1 by default.
        seen: (B,1) real tokens that were given so far; those that are there by default.
        prompt_slots: (B*Hkv,1) slots that the plan at the prompt left, in decode.
        frame_of: (B,N) number of the frame that a visual slot is of, -1 elsewhere.
        memory: (B*Hkv,M) what ``remember`` returned in the step before.
        rotary: rotary tables, for methods that undo a rotation.
        mrope: whether positions are places in time and image, so that keys of different places must not be averaged.
        marks: what was found of ``visual`` and ``valid`` so far (:meth:`marked`), of another layer with the same ones.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        attention: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        kv_heads: int,
        visual: Tensor | None = None,
        valid: Tensor | None = None,
        scores: Tensor | None = None,
        layer: int = 0,
        depth: int = 1,
        step: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        columns: Tensor | None = None,
        seen: Tensor | None = None,
        prompt_slots: Tensor | None = None,
        frame_of: Tensor | None = None,
        memory: Tensor | None = None,
        rotary: Rotary | None = None,
        mrope: bool = False,
        marks: dict[Hashable, Any] | None = None,
    ) -> None:
        if keys.dim() != 3 or values.shape[:2] != keys.shape[:2]:
            raise ValueError(
                f"keys and values have shape (batch * kv_heads, slots, channels), not {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        if kv_heads < 1 or keys.shape[0] % kv_heads:
            raise ValueError(f"{keys.shape[0]} rows are no whole number of samples with kv_heads={kv_heads}")
        self.keys, self.values, self.kv_heads = keys, values, kv_heads
        self.layer, self.depth, self.step = layer, depth, step
        self.scores, self.prompt_slots, self.mrope = scores, prompt_slots, mrope
        self.scale = keys.shape[-1] ** -0.5 if scale is None else scale
        self.softcap, self.mask = softcap, mask
        self._attention, self._queries, self._visual, self._rotary = attention, queries, visual, rotary
        self._columns, self._seen, self._frame_of, self._memory = columns, seen, frame_of, memory
        self._valid = valid
        self._known: dict[Hashable, Tensor] = {}
        self._marks = {} if marks is None else marks
        for name, given in (("attention", attention), ("queries", queries)):
            if given is not None and (given.dim() != 4 or given.shape[0] != keys.shape[0]):
                raise ValueError(
                    f"{name} has shape (batch * kv_heads, query heads of each, rows, ...), not {tuple(given.shape)} "
                    f"for {keys.shape[0]} rows"
                )
        for name, given in (("visual", visual), ("valid", valid)):
            if given is not None and (given.shape[-1] != self.n or given.shape[0] not in (self.batch, keys.shape[0])):
                raise ValueError(f"{name} has shape (batch, slots) {(self.batch, self.n)}, not {tuple(given.shape)}")

    # -- sizes -----------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.keys.shape[0] // self.kv_heads

    @property
    def n(self) -> int:
        """Number of slots N."""
        return self.keys.shape[1]

    @property
    def groups(self) -> int:
        """Query heads G for each KV head."""
        given = self._attention if self._attention is not None else self._queries
        return 1 if given is None else given.shape[1]

    @property
    def rows_given(self) -> int:
        """Number R of the last queries that are known; 0 where none are."""
        given = self._attention if self._attention is not None else self._queries
        return 0 if given is None else given.shape[2]

    def fold(self, per_sample: Tensor) -> Tensor:
        """(B,...) repeated for every head, (B*Hkv,...); (B*Hkv,...) as it is."""
        same = per_sample.shape[0] == self.keys.shape[0]
        return per_sample if same else per_sample.repeat_interleave(self.kv_heads, 0)

    def unfold(self, folded: Tensor) -> Tensor:
        """(B*Hkv,...) as (B,Hkv,...)."""
        return folded.unflatten(0, (self.batch, self.kv_heads))

    def bare(self) -> CacheEvidence:
        """The same without queries and attention: what a summary may hold on to, since the rest is in the cache."""
        out = copy.copy(self)
        out._attention = out._queries = out.mask = None
        out._known = {}
        return out

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, which is asked once for each ``key``: what both ``score`` and ``plan`` of a method need."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def marked(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()`` of which slots are there and which are visual, and of nothing else: it is asked once for each
        ``key``, and once for all layers whose slots are the same."""
        if key not in self._marks:
            self._marks[key] = compute()
        return self._marks[key]  # type: ignore[no-any-return]

    # -- which slots -----------------------------------------------------------------------------------------------
    @property
    def there(self) -> Tensor:
        """(B*Hkv,N) bool: slots that hold a token."""
        return self.marked("there", self._there)

    def _there(self) -> Tensor:
        if self._valid is None:
            return torch.ones(self.keys.shape[:2], dtype=torch.bool, device=self.keys.device)
        return self.fold(self._valid.bool())

    @property
    def all_there(self) -> bool:
        valid = self._valid
        return valid is None or self.marked("all", lambda: bool(valid.all()))

    @property
    def visual(self) -> Tensor:
        """(B*Hkv,N) bool: slots that hold visual tokens. Raises ``ValueError`` where none are marked."""
        marks = need(self._visual, "visual")
        return self.marked("visual", lambda: self.fold(marks.bool()) & self.there)

    @property
    def counts(self) -> Tensor:
        """(B*Hkv,1) slots that are there."""
        return self.marked("counts", lambda: self.there.sum(1, keepdim=True))

    @property
    def columns(self) -> Tensor:
        """(B*Hkv,N) column of every slot."""
        if self._columns is None:
            return torch.arange(self.n, device=self.keys.device).expand(self.keys.shape[:2])
        return self.fold(self._columns)

    @property
    def located(self) -> bool:
        """Whether columns were given, so that slots of two layers can be compared."""
        return self._columns is not None

    @property
    def seen(self) -> Tensor:
        """(B*Hkv,1) real tokens that were given so far."""
        return self.counts if self._seen is None else self.fold(self._seen)

    @property
    def frame_of(self) -> Tensor:
        """(B*Hkv,N) number of the frame of a visual slot, -1 elsewhere."""
        return self.fold(need(self._frame_of, "frame_of"))

    @property
    def has_frames(self) -> bool:
        """Whether it is known which frames the slots are of."""
        return self._frame_of is not None

    @property
    def memory(self) -> Tensor:
        """(B*Hkv,M) what ``remember`` returned in the step before."""
        return need(self._memory, "memory")

    @property
    def rotary(self) -> Rotary:
        if self._rotary is None:
            raise ValueError("this method needs the rotary tables, which the evidence lacks: give rotary=Rotary(...)")
        return self._rotary

    def last(self, count: int | Tensor) -> Tensor:
        """(B*Hkv,N) bool: the last ``count`` slots that are there, ``count`` an int or (B*Hkv,1)."""
        there = self.there
        behind = there.long().flip(1).cumsum(1).flip(1)
        return there & (behind <= count)

    def first(self, count: int | Tensor) -> Tensor:
        """(B*Hkv,N) bool: the first ``count`` slots that are there, ``count`` an int or (B*Hkv,1)."""
        there = self.there
        return there & (there.long().cumsum(1) <= count)

    # -- attention -------------------------------------------------------------------------------------------------
    @property
    def queries(self) -> Tensor:
        """(B*Hkv,G,R,d) the last R queries, behind their rotation."""
        return need(self._queries, "queries")

    def row_there(self, rows: int | None = None) -> Tensor:
        """(B*Hkv,R) bool: which of the last ``rows`` queries (all that are known) are of real tokens."""
        r = self.rows_given if rows is None else min(rows, self.rows_given)
        return self.there[:, self.n - r :]

    def rows(self, rows: int | None = None) -> Tensor:
        """(B*Hkv,G,R,N) float32: causal softmax rows of the last ``rows`` queries (all that are known; fewer where
        fewer are). Rows of padding are 0. Raises ``ValueError`` for evidence with neither attention nor queries."""
        if self._attention is None and self._queries is None:
            raise ValueError("this method needs attention, which the evidence lacks: give attention=... or queries=...")
        r = self.rows_given if rows is None else min(rows, self.rows_given)
        return self._rows(self.rows_given - r, self.rows_given)

    def reach(self, stop: int) -> int:
        """How many of the first slots the known queries in front of ``stop`` may see: what is behind need not be
        computed."""
        causal = self.mask is None and self._attention is None
        return self.n - self.rows_given + stop if causal else self.n

    def logits(self, start: int, stop: int, slots: Tensor | None = None, width: int | None = None) -> Tensor:
        """(B*Hkv,G,R,N) float32: masked logits of the queries ``start`` to ``stop`` of those that are known, -inf where
        a query does not see a key; of the first ``width`` keys where given. With ``slots`` (B*Hkv,W), those of these
        keys only, (B*Hkv,G,R,W), also where they are not seen. From given attention, logits are right up to a number
        for each row, and always masked."""
        if self._attention is not None:
            rows = self._attention[:, :, start:stop, :width].float().log()
            return rows if slots is None else rows.gather(3, slots[:, None, None].expand(*rows.shape[:3], -1))
        keys = self.keys[:, :width] if slots is None else take(self.keys, slots)
        logits = (self.queries[:, :, start:stop].float() * self.scale) @ keys.float().unsqueeze(1).transpose(-1, -2)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if slots is not None else logits.masked_fill_(~self._sees(start, stop, width), float("-inf"))

    def _sees(self, start: int, stop: int, width: int | None = None) -> Tensor:
        """(B*Hkv or 1,1,R,N) bool: which keys a query sees."""
        device, first = self.keys.device, self.n - self.rows_given
        if self.mask is not None:
            mask = self.mask[:, :, start:stop, :width]
            mask = mask.expand(self.batch, -1, -1, -1) if mask.shape[0] == 1 else mask
            out = self.fold(mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
        else:
            at = torch.arange(first + start, first + stop, device=device)
            out = (torch.arange(self.n, device=device)[:width] <= at[:, None])[None, None]
        return out & self.there[:, None, None, :width]

    def _rows(self, start: int, stop: int, width: int | None = None) -> Tensor:
        """Rows of padding are 0, whatever it holds; NaN that a real row sees stays, so that no choice is made on it."""
        if self._attention is None and self._valid is None and self.mask is None:  # every row is there, and sees itself
            return self.logits(start, stop, width=width).softmax(-1)
        gone = ~self.there[:, self.n - self.rows_given :][:, start:stop][:, None, :, None]
        if self._attention is not None:
            return self._attention[:, :, start:stop, :width].float().masked_fill(gone, 0.0)
        gone = gone | ~self._sees(start, stop, width).any(-1, keepdim=True)
        return self.logits(start, stop, width=width).softmax(-1).masked_fill(gone, 0.0)

    def column_sums(self, weights: Tensor | None = None, rows: int | None = None) -> Tensor:
        """(B*Hkv,G,N) float32: what every slot got from the last ``rows`` queries (all that are known), each times its
        weight, (R,) or (B*Hkv,R). Computed in blocks of rows."""
        if weights is not None:
            weights = weights.float().expand(self.keys.shape[0], -1)
        known = self.rows_given
        r = known if rows is None else min(rows, known)
        if not r:
            raise ValueError("this method needs attention, of which the evidence has no row: give attention or queries")
        out = torch.zeros(self.keys.shape[0], self.groups, self.n, device=self.keys.device)
        for start in range(known - r, known, _BLOCK):
            stop = min(start + _BLOCK, known)
            width = self.reach(stop)
            block = self._rows(start, stop, width)
            if weights is None:
                gained = block.sum(2)
            else:
                mine = weights[:, start - (known - r) : stop - (known - r)]
                gained = (mine[:, None, None] @ block).squeeze(2)
            out[..., :width] += gained
        return out

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """:meth:`rows` in blocks, so that N x N numbers never exist at once: ``(first, block)``, where ``first`` counts
        from the first of the ``rows`` that are asked for."""
        if self._attention is None and self._queries is None:
            self.rows()
        known = self.rows_given
        begin = known - (known if rows is None else min(rows, known))
        for start in range(begin, known, _BLOCK):
            yield start - begin, self._rows(start, min(start + _BLOCK, known))

    def readers(self, rows: int | None = None) -> Tensor:
        """(B*Hkv,N): how many of the last ``rows`` queries (all that are known) see a slot in causal order."""
        r = self.rows_given if rows is None else min(rows, self.rows_given)
        real = self.there.long()
        real[:, : self.n - r] = 0
        return real.flip(1).cumsum(1).flip(1)
