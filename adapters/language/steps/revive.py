"""Decode: a method chooses again among all tokens of the prompt, and those that it let go before come back.

A token whose keys the caches lack from a layer on, because an earlier choice let it go, comes back where the method
says so: its features were set aside when it went, run through the layers beside the new token at its own position, and
its keys are appended to the caches, so that it passes each layer at most once. Caches hold tokens in the order in which
they came, so from then on the columns of a generation know which slot holds which
(:attr:`~tokenreduce.adapters.language.columns.Columns.revived`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.decode import Asker, Choice, chooses, note_choice
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.rotary import rows_of
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.adapters.language.state import Record

__all__ = ["LastOnly", "Revive", "SetAside"]


@dataclass
class Evicted(Record):
    """By layer: features ``x`` (B,E,C) of tokens that went before it, by their slot at the entry of the language model;
    ``here`` (B,E) marks those that did not come back yet."""

    x: Tensor
    here: Tensor

    def reorder(self, rows: Tensor) -> None:
        self.x, self.here = self.x[rows], self.here[rows]

    def put(self, rows: Tensor, slots: Tensor, x: Tensor) -> None:
        """Keep ``x`` (M,C) for ``slots`` (M,) of the samples ``rows`` (M,)."""
        self.x[rows, slots], self.here[rows, slots] = x, True


@dataclass
class PromptTables(Record):
    """Rotary tables of the prompt's columns."""

    tables: tuple[Tensor, ...]


@dataclass(frozen=True)
class SetAside(LayerStep):
    """In prefill, behind :class:`~tokenreduce.adapters.language.steps.choose.Choose`: keep the features of what went,
    for decode steps that bring it back."""

    def before(self, call: LayerCall) -> None:
        columns, index, x = call.columns, call.index, call.whole
        cut = columns.cut_at(index)
        if not call.prefill or call.cache is None or cut is None or cut.layer != index:
            return
        assert x is not None
        _check_grows(call.cache.layers[index], x.shape[1])
        call.state.put(PromptTables(tuple(t.detach() for t in call.tables)))
        stays, before = torch.zeros_like(columns.visual_at(index - 1)), columns.cut_at(index - 1)
        rows, slots = cut.local.only(cut.columns.there).real().nonzero(as_tuple=True)
        stays[rows, cut.local.at[rows, slots]] = True
        rows, at = (columns.visual_at(index - 1) & ~stays).nonzero(as_tuple=True)
        gone = at if before is None else before.columns.at[rows, at]
        _evicted(call, x).put(rows, columns.slots_at(-1).at[rows, gone], x.detach()[rows, at])


def _check_grows(cache_layer: Any, tokens: int) -> None:
    if cache_layer.get_mask_sizes(tokens)[0] > tokens:
        raise ValueError(
            "a static cache has no slots for tokens that come back in decode; leave cache_implementation at its "
            "default, or set revive=false"
        )


def _evicted(call: LayerCall, x: Tensor) -> Evicted:
    """What was set aside before the layer, made empty at its first use; ``x`` (B,N,C) has the features' type."""
    known = call.state.get(Evicted, call.index)
    if known is None:
        entry, (batch, length) = call.columns.cut_at(-1), call.columns.visual.shape
        n = length if entry is None else entry.k
        none = torch.zeros(batch, n, dtype=torch.bool, device=x.device)
        known = call.state.put(Evicted(x.new_zeros(batch, n, x.shape[-1]), none), call.index)
    return known


@dataclass(frozen=True)
class Revive(LayerStep):
    """In a decode step: what the method leaves of all tokens, from this layer on, and in front of the new one those of
    them that the caches lack."""

    asker: Asker

    def before(self, call: LayerCall) -> None:
        if chooses(call):
            with torch.no_grad():
                live = self.asker.ask(call).live
                choice = self._choice(call, live)
            if choice is not None:
                call.forward.state.put(choice, call.index)
            note_choice(call, self.asker.method, live, None if choice is None else choice.back)
        elif call.forward.phase == "turn":
            _take_turn(call)

    def _choice(self, call: LayerCall, live: Tensor) -> Choice | None:
        """What comes back of ``live`` (B,C), in front of the new token in ``call.x``. None where the caches hold just
        what is live, as the prefill left it."""
        columns, index, total = call.columns, call.index, live.shape[1]
        made = call.forward.state.layers(Choice)
        earlier = call.forward.state.get(Choice, made[-1]) if made else None
        held = columns.of_layer(index, int(call.cache.layers[index].get_seq_length()))
        if call.x.shape[1] > 1 and earlier is not None and earlier.back is not None:
            _set_aside_again(call, earlier.back)
        has = live.new_zeros(len(live), total + 1).scatter_(1, torch.where(held.real(), held.at, total), True)
        back = _missing(live, has[:, :total], columns.length)
        call.x = call.x[:, -1:]
        revived = columns.revived[index] is not None
        if not back.k and earlier is None and not revived and not bool((has[:, :total] & ~live).any()):
            return None
        tables = tuple(t[..., -1:, :] for t in call.tables)
        if back.k:
            tables = _bring(call, back, tables)
        if back.k or revived:
            columns.revived[index] = held.then(back, ColumnIndex(torch.full_like(held.at[:, :1], total - 1)))
        return Choice(live, back, tables, held)

    def __str__(self) -> str:
        return f"revive ({self.asker.method.spec()})"


def _missing(live: Tensor, has: Tensor, length: int) -> ColumnIndex:
    """(B,R) the columns of the prompt that are ``live`` (B,C), of which a cache ``has`` (B,C) others; ascending, filled
    on the left."""
    missing = (live & ~has)[:, :length]
    count = int(missing.sum(1).max())
    order = missing.long().argsort(dim=1, stable=True)[:, length - count :]
    return ColumnIndex(order, missing.gather(1, order))


def _set_aside_again(call: LayerCall, back: ColumnIndex) -> None:
    """Keep what came ``back`` before an earlier layer: some of it goes on, the rest may come back later."""
    rows, at = back.real().nonzero(as_tuple=True)
    slots = call.columns.slots_at(-1).at[rows, back.at[rows, at]]
    _evicted(call, call.x).put(rows, slots, call.x[rows, at])


def _bring(call: LayerCall, back: ColumnIndex, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the tokens that come ``back`` in front of the new one; the rotary tables of all."""
    store, known = call.state.get(Evicted, call.index), call.state.get(PromptTables)
    assert store is not None
    assert known is not None
    slots = call.columns.slots_at(-1).at.gather(1, back.at).clamp(min=0)
    call.x = torch.cat([store.x.gather(1, slots.unsqueeze(-1).expand(-1, -1, call.x.shape[-1])), call.x], 1)
    rows, at = back.real().nonzero(as_tuple=True)
    store.here[rows, slots[rows, at]] = False
    return tuple(_beside(rows_of(old, back.at), t) for old, t in zip(known.tables, tables, strict=True))


def _beside(old: Tensor, new: Tensor) -> Tensor:
    """Rotary tables (B,R,d) of old tokens and (B or 1,1,d) of the new one; (3,B,R,d) in early releases' M-RoPE."""
    return torch.cat([old, new.expand(*old.shape[:-2], 1, old.shape[-1])], -2)


def _take_turn(call: LayerCall) -> None:
    """Several new tokens, a later turn: no choice is made, and all of them go where tokens came back."""
    columns, index = call.columns, call.index
    if columns.revived.get(index) is None:
        return
    held = columns.of_layer(index, int(call.cache.layers[index].get_seq_length()))
    columns.revived[index] = held.then(_new_columns(call, columns))


def _new_columns(call: LayerCall, columns: Columns) -> ColumnIndex:
    """(B,Q) the columns of a turn's tokens, without padding."""
    total = columns.given(int(call.cache.layers[0].get_seq_length()))
    new = torch.arange(total - call.forward.new, total, device=call.x.device).expand(len(call.x), -1)
    return columns.without_padding(ColumnIndex(new))


@dataclass(frozen=True)
class LastOnly(LayerStep):
    """Behind the last layer, in decode: the new token alone goes on; what came back beside it is in the caches."""

    ends = True

    def behind(self, call: LayerCall, output: Any) -> Any:
        if call.forward.phase != "decode":
            return output
        if isinstance(output, tuple):
            return (output[0][:, -1:], *output[1:]) if output[0].shape[1] > 1 else output
        return output[:, -1:] if output.shape[1] > 1 else output
