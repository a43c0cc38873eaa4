"""What runs along columns, for a layer behind a cut: rotary tables, position ids, and the mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import is_causal
from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.decode_masks import decode_mask, flash_mask
from tokenreduce.adapters.language.decoders import PER_LAYER, attends, check_implementation, ids_left
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.masks import Masks, Shown, add_sizes, gather_mask
from tokenreduce.adapters.language.rotary import rows_of
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.adapters.language.state import Record

__all__ = ["GatherColumns"]

#: What is taken to the columns one by one, and not as routing ids are.
_FOLLOWS = ("attention_mask", "position_ids", "hidden_states")


@dataclass
class Tables(Record):
    """Rotary tables of the columns that a cut left, and the stock ones they are from, for the layers that share them;
    these are held as well, so that no other can get their ids while they are a key."""

    made: dict[Any, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=dict)


@dataclass
class Told(Record):
    """What a layer behind a cut is told instead of what its caller says, for the layers that are alike and called with
    the same; what they are called with is held as well, so that no other can get its id while that is a key."""

    made: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class GatherColumns(LayerStep):
    """Show the layer the columns that its cache holds; ``window`` is the width of its sliding window, if it has one."""

    window: int | None = None

    @property
    def rests(self) -> bool:
        """Windows count columns that are gone."""
        return self.window is None

    def before(self, call: LayerCall) -> None:
        columns, prefill = call.columns, call.prefill
        cut = columns.cut_at(call.index)
        if cut is None or (not prefill and call.index in columns.held):
            return
        if not attends(call.layer):
            if prefill:
                self._state(call, cut)
        elif prefill:
            self._prompt(call, cut)
        elif call.attention is None:  # else a step that chooses in decode has made the mask
            stock, made = call.mask, call.forward.state.of(Masks).made
            key = ("here", id(cut), id(stock), self.window)
            if not (call.forward.even and key in made):
                made[key] = self._decode(call, cut)
                made[id(stock)] = stock  # held, so that no other mask can get its id
            call.mask = made[key]

    def _decode(self, call: LayerCall, cut: Cut) -> Tensor | None:
        """The mask for new tokens."""
        call.columns.check_batch(call.x.shape[0])
        name = check_implementation(call.layer, call.index, self.window)
        call.mask = decode_mask(call, cut, self.window, name)
        if cut.bias is not None:
            _sizes(call, cut, name, Shown.by(call.cache.layers[call.index], call.x.shape[1]))
        mask: Tensor | None = call.mask
        return mask

    def _state(self, call: LayerCall, cut: Cut) -> None:
        """A layer with a state reads a mask (B,N) of padding, which leaves no trace in front of a row's first token; in
        decode it needs nothing."""
        _follow(call, cut)
        mask, there = call.mask, cut.columns.there
        if mask is not None:
            mask = mask.expand(len(cut.here), -1).gather(1, cut.here)
            there = None if there is None else there[:, cut.front :].to(mask.dtype)
            call.mask = mask if there is None else mask * there
        elif there is not None:
            call.mask = there[:, cut.front :].long()

    def _prompt(self, call: LayerCall, cut: Cut) -> None:
        n, cache, attention = call.x.shape[1], call.cache, call.layer.self_attn
        slots = n if cache is None else cache.layers[call.index].get_mask_sizes(n)[0]
        given, made = tuple(call.kwargs.values()), call.forward.state.of(Told).made
        alike = (type(attention), id(getattr(attention, "config", None)), is_causal(attention), self.window)
        key = (id(cut), n, slots, *alike, *map(id, given))
        if key not in made:
            before = dict(call.kwargs)
            self._tell(call, cut, n, slots)
            made[key] = given, {k: v for k, v in call.kwargs.items() if k not in before or v is not before[k]}
        else:
            call.kwargs.update(made[key][1])

    def _tell(self, call: LayerCall, cut: Cut, n: int, slots: int) -> None:
        implementation = check_implementation(call.layer, call.index, self.window)
        front = call.columns.front
        _follow(call, cut)
        if "flash" in implementation and cut.bias is None:
            call.mask = flash_mask(call.columns, cut, front + n, slots)
            return
        causal, made = is_causal(call.layer.self_attn), call.forward.state.of(Masks).made
        key = (id(cut), id(call.mask), slots, causal)
        if key not in made:
            made[key] = gather_mask(call.mask, cut.columns, slots, causal, front)
        call.mask = made[key]
        if cut.bias is not None:
            _sizes(call, cut, implementation, Shown(n, slots, past=front))


def _follow(call: LayerCall, cut: Cut) -> None:
    """Rotary tables and position ids of the columns that are left, and whatever else the caller said of each column."""
    if call.kwargs.get("position_embeddings") is not None:  # some layers know no positions
        call.tables = _tables(call.forward, cut, call.tables)
    call.kwargs["position_ids"] = ids_left(call.layer, call.kwargs.get("position_ids"), cut.here)
    whole = (len(cut.here), call.columns.length - cut.front)
    for name, value in call.kwargs.items():
        if isinstance(value, Tensor) and value.shape == whole and name not in _FOLLOWS:
            call.kwargs[name] = value.gather(1, cut.here.to(value.device))
        elif name == PER_LAYER and value is not None and value.shape[:2] == whole:
            call.kwargs[name] = rows_of(value, cut.here)


def _tables(forward: Forward, cut: Cut, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables of the columns that are left; gathered once for the layers that share them."""
    key, made = (id(cut), *map(id, tables)), forward.state.of(Tables).made
    if key not in made:
        made[key] = (tables, tuple(rows_of(t, cut.here) for t in tables))
    return made[key][1]


def _sizes(call: LayerCall, cut: Cut, implementation: str, shown: Shown) -> None:
    """Let merged tokens count by their sizes; the layers that share a mask share this one, too."""
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{call.columns.chosen_by} counts merged tokens by their sizes, for which {implementation} takes no bias; "
            f"call model.set_attn_implementation('sdpa'), or set size_bias='none'"
        )
    made, causal, bias = call.forward.state.of(Masks).made, is_causal(call.layer.self_attn), cut.bias
    key = ("sizes", id(cut), id(call.mask), shown)
    assert bias is not None
    if key not in made:
        made[key] = add_sizes(call.mask, bias, call.x, shown, causal)
    call.mask = made[key]
