"""What runs along columns, for a layer behind a cut: rotary tables, position ids, and the mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import is_causal
from tokenreduce.adapters.language.decoders import attends, check_implementation, ids_left
from tokenreduce.adapters.language.generation import Cut, Step, rows_of
from tokenreduce.adapters.language.later import later_mask
from tokenreduce.adapters.language.masks import add_sizes, gather_mask
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["GatherColumns"]

#: What is taken to the columns one by one, and not as routing ids are.
_FOLLOWS = ("attention_mask", "position_ids", "hidden_states")


@dataclass(frozen=True)
class GatherColumns(LayerStep):
    """Show the layer the columns that its cache holds; ``window`` is the width of its sliding window, if it has one."""

    window: int | None = None

    def before(self, call: LayerCall) -> None:
        cut = call.run.cut_at(call.index)
        if cut is None or (not call.step.prefill and call.index in call.run.held):
            return
        if not attends(call.layer):
            if call.step.prefill:
                self._state(call, cut)
        elif call.step.prefill:
            self._prompt(call, cut, check_implementation(call.layer, call.index, self.window))
        elif call.attention is None:  # else a step that chooses in decode has made the mask
            call.run.check_batch(call.x.shape[0])
            name = check_implementation(call.layer, call.index, self.window)
            call.mask = later_mask(call.mask, call.x, call.step, call.index, call.cache, self.window, name)
            if cut.bias is not None:
                mine, q = call.cache.layers[call.index], call.x.shape[1]
                past, (slots, offset) = int(mine.get_seq_length()), mine.get_mask_sizes(q)
                _sizes(call, cut, name, slots, past, offset)

    def _state(self, call: LayerCall, cut: Cut) -> None:
        """A layer with a state reads a mask (B,N) of padding, which leaves no trace in front of a row's first token; in
        decode it needs nothing."""
        _follow(call, cut)
        mask, there = call.mask, cut.valid
        if mask is not None:
            mask = mask.expand(len(cut.here), -1).gather(1, cut.here)
            there = None if there is None else there[:, cut.front :].to(mask.dtype)
            call.mask = mask if there is None else mask * there
        elif there is not None:
            call.mask = there[:, cut.front :].long()

    def _prompt(self, call: LayerCall, cut: Cut, implementation: str) -> None:
        run, n = call.run, call.x.shape[1]
        _follow(call, cut)
        slots = n if call.cache is None else call.cache.layers[call.index].get_mask_sizes(n)[0]
        if "flash" in implementation and cut.bias is None:
            call.mask = run.flash_mask(call.index, run.front + n, slots)
            return
        causal, made = is_causal(call.layer.self_attn), call.step.masks
        key = (id(cut), id(call.mask), slots, causal)
        if key not in made:
            made[key] = gather_mask(call.mask, cut.index, cut.valid, slots, causal, run.front)
        call.mask = made[key]
        if cut.bias is not None:
            _sizes(call, cut, implementation, slots, run.front, 0)


def _follow(call: LayerCall, cut: Cut) -> None:
    """Rotary tables and position ids of the columns that are left, and whatever else the caller said of each column."""
    if call.kwargs.get("position_embeddings") is not None:  # some layers know no positions
        call.tables = _tables(call.step, cut, call.tables)
    call.kwargs["position_ids"] = ids_left(call.layer, call.kwargs.get("position_ids"), cut.here)
    whole = (len(cut.index), call.run.length - cut.front)
    for name, value in call.kwargs.items():
        if isinstance(value, Tensor) and value.shape == whole and name not in _FOLLOWS:
            call.kwargs[name] = value.gather(1, cut.here.to(value.device))


def _tables(step: Step, cut: Cut, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables of the columns that are left; gathered once for the layers that share them."""
    key = (id(cut), *map(id, tables))
    if key not in step.tables:
        # The stock tables are held as well, so that no other can get their ids while they are a key.
        step.tables[key] = (tables, tuple(rows_of(t, cut.here) for t in tables))
    return step.tables[key][1]


def _sizes(call: LayerCall, cut: Cut, implementation: str, slots: int, past: int, offset: int) -> None:
    """Let merged tokens count by their sizes; the layers that share a mask share this one, too."""
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{call.run.methods} counts merged tokens by their sizes, for which {implementation} takes no bias; "
            f"call model.set_attn_implementation('sdpa'), or set size_bias='none'"
        )
    made, causal, bias = call.step.masks, is_causal(call.layer.self_attn), cut.bias
    key = ("sizes", id(cut), id(call.mask), slots, past, offset)
    assert bias is not None
    if key not in made:
        made[key] = add_sizes(call.mask, bias, call.x, slots, past=past, offset=offset, causal=causal)
    call.mask = made[key]
