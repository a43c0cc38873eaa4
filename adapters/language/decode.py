"""Decode steps in which a method chooses again: what it is shown, what it chose, and what it remembers.

Before its layer, a method is asked in every decode step with the attention that the new token paid in the layer
before (``Reducer.decode_mode``). From there to its next layer, attention is over the tokens that it left
(:mod:`tokenreduce.adapters.language.steps.show_choice`): their keys and values are gathered from the cache, which stays
complete. Tokens that an earlier choice let go are left alone
(:mod:`~tokenreduce.adapters.language.steps.hide`) or come back
(:mod:`~tokenreduce.adapters.language.steps.revive`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call, implementation, softcap_of
from tokenreduce.adapters.language.indices import ColumnIndex
from tokenreduce.adapters.language.records import Recorded
from tokenreduce.adapters.language.site import LayerCall
from tokenreduce.adapters.language.state import Record
from tokenreduce.core.evidence import Attention, Earlier, LanguageEvidence, Prompt
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import DecodeStep, active

__all__ = ["Asker", "Choice", "SeenColumns", "check_decode", "chooses", "note_choice"]

#: Steps that are remembered for when a cache is cropped: more than drafts have tokens.
REMEMBERED = 32


@dataclass(frozen=True, eq=False)
class EarlierStep:
    """A decode step: the new token's ``column``, its ``attention`` (B,L), mean over heads, and the columns (B,L) of the
    prompt that it left, ``stay``."""

    column: int
    attention: Tensor
    stay: Tensor


@dataclass
class EarlierSteps(Record):
    """By layer: the decode steps before, the last one last, as many as drafts may take back."""

    steps: list[EarlierStep] = field(default_factory=list)

    def crop(self, left: int) -> None:
        self.steps = [s for s in self.steps if s.column < left]

    def reorder(self, rows: Tensor) -> None:
        self.steps = [EarlierStep(s.column, s.attention[rows], s.stay[rows]) for s in self.steps]


@dataclass
class Choice(Record):
    """By layer: the choice that holds from there on in one decode step, ``live`` (B,C) of all columns. Tokens that came
    ``back`` (B,R) are in front of the new one, with rotary ``tables`` of all; ``before`` (B,S) is what the cache held
    then. Both are None where nothing can come back."""

    live: Tensor
    back: ColumnIndex | None = None
    tables: tuple[Tensor, ...] | None = None
    before: ColumnIndex | None = None
    #: What layers with the same slots show, by their cut.
    shown: dict[int, Any] = field(default_factory=dict)


@dataclass
class SeenColumns(Record):
    """By layer: the ``columns`` (B,K) whose keys the new token saw there."""

    columns: ColumnIndex


def chooses(call: LayerCall) -> bool:
    """Whether this is a decode step in which methods choose. Raises ``ValueError`` for a cache that has other rows now,
    and for a mask that says by itself what the new token sees."""
    if call.prefill or not call.columns.revived:
        return False
    call.columns.check_batch(call.x.shape[0])
    if call.forward.phase != "decode":
        return False
    if call.forward.masked:
        raise ValueError(
            "attention_mask says by itself what a new token sees, where a method on this model chooses that in every "
            "decode step; give a padding mask (batch, tokens), or leave that method out"
        )
    return True


@dataclass(frozen=True, eq=False)
class Asked:
    """What a method answers in a decode step: ``live`` (B,C) of all columns, and whether that is ``everything`` that it
    was shown."""

    live: Tensor
    everything: bool


@dataclass(frozen=True)
class Asker:
    """Puts its question to ``method``, which acts before a layer of ``depth``."""

    method: Reducer
    depth: int

    def ask(self, call: LayerCall) -> Asked:
        """Which columns stay, by the attention of the layer before; what is chosen is remembered."""
        columns, index = call.columns, call.index
        shown = _columns_before(call)
        recorded = call.state.pop(Recorded, index - 1)
        assert recorded is not None
        row = _row(call.layer, recorded.call, shown)
        known = call.state.of(EarlierSteps, index)
        last = known.steps[-1] if known.steps else None
        plan = self.method.plan(self._evidence(call, shown, row, last))
        total = columns.given(int(call.cache.layers[0].get_seq_length()))
        live = row.new_zeros(len(row), total + 1, dtype=torch.bool)
        stay = shown.only(plan.sources() >= 0).real()
        live = live.scatter_(1, torch.where(stay, shown.at, total), True)[:, :total]
        live[:, -1] = True
        known.steps.append(EarlierStep(total - 1, _of_prompt(row, shown, columns.length), live[:, : columns.length]))
        del known.steps[:-REMEMBERED]
        return Asked(live, plan.is_identity)

    def _evidence(self, call: LayerCall, shown: ColumnIndex, row: Tensor, last: EarlierStep | None) -> LanguageEvidence:
        columns = call.columns
        prompt, at = _in_prompt(shown, columns.length), shown.at.clamp(max=columns.length - 1)
        held = columns.slots_at(call.index).real() if last is None else last.stay
        return LanguageEvidence(
            row.new_zeros(*shown.at.shape, 0),
            Attention(given=row, valid=shown.there, cls=False),
            visual=columns.is_visual(shown),
            valid=shown.there,
            layer=call.index,
            depth=self.depth,
            entry=columns.length,
            prompt=Prompt(columns.visual_at(-1), columns.real_at(-1)),
            earlier=None if last is None else Earlier(last.attention.gather(1, at), last.stay.gather(1, at)),
            held=prompt & held.gather(1, at),
        )


def _columns_before(call: LayerCall) -> ColumnIndex:
    """(B,S) the columns whose keys the new token saw in the layer before."""
    seen = call.forward.state.pop(SeenColumns, call.index - 1)
    if seen is not None:
        return seen.columns
    return call.columns.of_layer(call.index - 1, int(call.cache.layers[call.index - 1].get_seq_length()))


def _in_prompt(shown: ColumnIndex, length: int) -> Tensor:
    return shown.only(shown.at < length).real()


def _of_prompt(row: Tensor, shown: ColumnIndex, length: int) -> Tensor:
    """(B,L) of the ``row`` (B,H,1,S), mean over heads, what was paid to the prompt's columns."""
    means = row[:, :, 0].mean(1)
    slot = torch.where(_in_prompt(shown, length), shown.at, length)
    return means.new_zeros(len(means), length + 1).scatter(1, slot, means)[:, :-1]


def _row(layer: Any, seen: Call, shown: ColumnIndex) -> Tensor:
    """(B,H,1,S) what the new token, the last query, paid to the keys of the columns ``shown`` (B,S)."""
    assert seen.queries is not None
    assert seen.keys is not None
    q, k = seen.queries[:, :, -1:], seen.keys[:, :, : shown.k]
    seen.queries, seen.keys, seen.values = None, None, None
    scale, softcap = getattr(layer.self_attn, "scaling", None), softcap_of(layer.self_attn)
    return Attention(q, k, scale=scale, softcap=softcap, valid=shown.there)("cls")  # of the one query


def note_choice(call: LayerCall, method: Reducer, live: Tensor, back: ColumnIndex | None = None) -> None:
    """Tell an active trace what a method chose before the layer."""
    trace = active()
    if trace is None:
        return
    columns, none = call.columns, torch.zeros(len(live), dtype=torch.long, device=live.device)
    came = none if back is None else back.real().sum(1)
    seen = live[:, : columns.length] & columns.visual
    trace.add_decode(call.layer, DecodeStep(call.index, method.spec(), seen, came))


def check_decode(acting: list[list[Reducer]], windows: list[int | None], layers: Any) -> None:
    """Raise ``ValueError`` for methods whose decode steps do not go together, or not with the model's attention."""
    every = {id(r): r for here in acting for r in here}
    stepwise = [r for r in every.values() if r.decode_mode()]
    if len(stepwise) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in stepwise)} both choose again in decode; choose one")
    if not stepwise:
        return
    method = stepwise[0]
    first = next(i for i, here in enumerate(acting) if method in here)
    if any(w is not None for w in windows[max(first - 1, 0) :]):
        raise ValueError(
            f"{method.spec()} chooses again in decode, which layers with sliding windows are not supported for; "
            + ("set revive=false" if hasattr(method, "revive") else "choose a method that chooses in prefill (fastv)")
        )
    if method.decode_mode() != "revive":
        return
    others = [r.spec() for r in every.values() if r is not method]
    if others:
        raise ValueError(
            f"{method.spec()} brings tokens back in decode, which {' and '.join(others)} would drop for good in a "
            f"layer behind; set revive=false or leave that out"
        )
    name = implementation(layers[first].self_attn)
    if "flash" in name:
        raise ValueError(
            f"{method.spec()} brings tokens back in decode, in steps of several tokens at old positions, for which "
            f"{name} has no mask; set revive=false or call model.set_attn_implementation('sdpa')"
        )
