"""Decode: a layer sees the keys of what a method chose before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call, implementation
from tokenreduce.adapters.language.decode import Choice, SeenColumns, chooses
from tokenreduce.adapters.language.decode_masks import columns_of_mask
from tokenreduce.adapters.language.decoders import needs_ids
from tokenreduce.adapters.language.indices import ColumnIndex, SlotIndex
from tokenreduce.adapters.language.masks import as_added
from tokenreduce.adapters.language.records import Recorded
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["ShowChoice"]


@dataclass(frozen=True, eq=False)
class ShownKeys:
    """What a layer sees: the ``slots`` (B,K) of its cache in the order of their ``columns`` (B,K), and who sees them,
    ``mask`` (B,1,Q,K) bool; None for all slots, and for everything."""

    slots: SlotIndex | None
    mask: Tensor | None
    columns: ColumnIndex


@dataclass(frozen=True)
class ShowChoice(LayerStep):
    """In a decode step: show the layer the keys of what the choice before layer ``since`` left; ``reads``: the next
    layer's method reads this layer's attention. The layer then needs no other mask."""

    since: int
    reads: bool
    listens = True

    def before(self, call: LayerCall) -> None:
        if not chooses(call):
            self._show_turn(call)
            return
        choice = call.forward.state.get(Choice, self.since)
        if choice is None:
            return
        shown = _shown(call, choice)
        call.mask = _for_attention(call, shown.mask)
        call.kwargs["position_ids"] = _ids(call)
        if choice.tables is not None:
            call.tables = choice.tables
        seen = Call(call.mask, record=self.reads, take=None if shown.slots is None else shown.slots.at)
        call.attention = seen
        if self.reads:
            call.state.put(Recorded(seen), call.index)
            call.forward.state.put(SeenColumns(shown.columns), call.index)

    def _show_turn(self, call: LayerCall) -> None:
        """Several new tokens, a later turn, see all that the caches hold, where some of it came back."""
        known = call.columns.revived.get(self.since)
        if call.forward.phase != "turn" or known is None:
            return
        if isinstance(call.mask, Tensor) and call.mask.dim() == 4:
            call.mask = columns_of_mask(call.mask, known, call.forward, call.cache)
            call.kwargs["position_ids"] = None
        else:
            call.mask = _for_attention(call, _turn_mask(call, known))
            call.kwargs["position_ids"] = _ids(call)
        call.attention = Call(call.mask)


def _turn_mask(call: LayerCall, known: ColumnIndex) -> Tensor:
    """(B,1,Q,S) bool for the tokens of a turn, on a cache that holds the columns ``known`` (B,S)."""
    n, past, device = call.forward.new, int(call.cache.layers[call.index].get_seq_length()), call.x.device
    total = call.columns.given(int(call.cache.layers[0].get_seq_length()))
    new = torch.arange(total - n, total, device=device).expand(len(call.x), -1)
    mask = (known.real()[:, None] & (known.at[:, None] <= new[..., None]))[:, None]
    own = torch.arange(known.k, device=device) == past + torch.arange(n, device=device)[:, None]
    return mask | (own & ~mask.any(-1, keepdim=True))  # rows of padding see themselves, so that none is empty


def _shown(call: LayerCall, choice: Choice) -> ShownKeys:
    """What the layer shows of its cache by ``choice``; layers with the same slots share it."""
    key = id(call.columns.cut_at(call.index))
    if key not in choice.shown:
        choice.shown[key] = _choose_keys(call, choice)
    shown: ShownKeys = choice.shown[key]
    return shown


def _choose_keys(call: LayerCall, choice: Choice) -> ShownKeys:
    total, before = choice.live.shape[1], choice.before
    if before is None:
        before = call.columns.of_layer(call.index, int(call.cache.layers[call.index].get_seq_length()))
    new = ColumnIndex(torch.full_like(before.at[:, :1], total - 1))
    queries = new if choice.back is None else choice.back.then(new)
    held = before.then(queries)
    seen = held.only(choice.live.gather(1, held.at)).real()
    width = int(seen.sum(1).max())
    take = held.at.masked_fill(~seen, -1).argsort(dim=1, stable=True)[:, held.k - width :]
    valid = seen.gather(1, take)
    columns = ColumnIndex(held.at.gather(1, take), valid)
    mask: Tensor | None = None
    if queries.k > 1:
        # Rows that are padding see everything, so that none is empty; nobody sees them.
        sees = (columns.at[:, None] <= queries.at[..., None]) | ~queries.real()[..., None]
        mask = (valid[:, None] & sees)[:, None]
    elif not bool(valid.all()):
        mask = valid[:, None, None]
    every = width == held.k and bool((take.diff(dim=1) == 1).all())
    return ShownKeys(None if every else SlotIndex(take), mask, columns)


def _for_attention(call: LayerCall, mask: Tensor | None) -> Tensor | None:
    """``mask`` (B,1,Q,K) bool, as the layer's attention takes it."""
    name = implementation(call.layer.self_attn)
    if mask is not None and "flash" in name:
        return mask[:, 0, 0]
    return as_added(mask, call.x) if mask is not None and name == "eager" else mask


def _ids(call: LayerCall) -> Tensor | None:
    """Position ids of the new tokens for a layer that needs them; no tokens come back there."""
    return call.kwargs.get("position_ids") if needs_ids(call.layer) else None
