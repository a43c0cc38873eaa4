"""The blocks of packed towers, in which methods see units of patches (:mod:`tokenreduce.adapters.encoders.qwen`)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from tokenreduce.adapters.encoders.ask import Attended
from tokenreduce.adapters.encoders.block import Reduced, View
from tokenreduce.adapters.encoders.hf_attention import CALL
from tokenreduce.adapters.encoders.packed import Layout, Packed
from tokenreduce.adapters.encoders.packed_pixels import PackedPixels, packed_plans
from tokenreduce.adapters.encoders.packed_rebuilding import SetsAside
from tokenreduce.adapters.encoders.pixels import AtEntry
from tokenreduce.adapters.encoders.qwen_attention import PackedAsk, project
from tokenreduce.adapters.encoders.rebuilding import note_entered
from tokenreduce.adapters.encoders.site import Site
from tokenreduce.adapters.encoders.state import collected, set_state, state_of
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_pre_hooks
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import active

__all__ = ["LAYOUT", "PIXELS", "Context", "PackedBlock", "ReducedQwen25Block", "ReducedQwen2Block", "ReducedQwen3Block"]

_SEEN = frozenset(("keys", "queries", "values", "attention"))
#: Keyword under which the layout of a call travels from the tower to its blocks.
LAYOUT = "tokenreduce_layout"
#: Keyword under which the pixels of a call travel there, where a method looks at them.
PIXELS = "tokenreduce_pixels"


class Context(NamedTuple):
    """What a block was called with besides its patches, for those that are left."""

    bounds: Tensor
    rope: tuple[Tensor, Tensor]
    kwargs: dict[str, Any]

    def at(self, packed: Packed) -> Context:
        if packed.at is None:
            return self
        longest = {"max_seqlen": None} if "max_seqlen" in self.kwargs else {}  # the stock code counts again
        cos, sin = self.rope
        return Context(packed.bounds(self.bounds), (packed.rows(cos), packed.rows(sin)), {**self.kwargs, **longest})


class PackedBlock(SetsAside, Reduced):
    """A packed block. The state on its input and output is a :class:`~tokenreduce.adapters.encoders.packed.Packed`."""

    _tokenreduce_site: Site

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        site, layout, pixels = self._tokenreduce_site, kwargs.pop(LAYOUT, None), kwargs.pop(PIXELS, None)
        context, x = Context(cu_seqlens, position_embeddings, kwargs), hidden_states
        packed = self._begin(site, x, layout)
        if site.entry is not None:
            x, packed = self._drop_at_input(site, site.entry, x, packed, pixels)
        reducer, first = site.reducer, x if site.leads else None
        where = None if reducer is None else reducer.acting_position()
        every = packed.every(x, site.layer)
        if reducer is not None and reducer.rebuilds:
            where = "aside"
            every, x, packed = self._set_patches_aside(site, reducer, x, packed)
        elif where == "before":
            assert reducer is not None
            shown = self._look(x, packed, context) if not _SEEN.isdisjoint(reducer.required()) else None
            x, packed = self._shrink(site, reducer, x, packed, context, shown, None)
        record = where in ("middle", "after") and not _SEEN.isdisjoint(reducer.required())  # type: ignore[union-attr]
        within, y = (packed, x) if every is None else (packed.lasting, every)
        across = within.seen(context.bounds)
        call = PackedAsk(within, within.bias() if across is None else None, record, across)
        now, attn, entered = context.at(within), self.attn, x  # type: ignore[attr-defined]
        refuse_own(attn)
        out = attn(
            self.norm1(y),  # type: ignore[attr-defined]
            cu_seqlens=now.bounds, position_embeddings=now.rope, **{**now.kwargs, CALL: call},
        )  # fmt: skip
        x = y + out if every is None else packed.take(y + out)
        if where == "middle":
            assert reducer is not None
            x, packed = self._shrink(site, reducer, x, packed, context, call, entered)
        middle = x if where == "after" else None
        # Nothing of the attention half may stay alive while the MLP holds its hidden layer: that is the peak.
        seen = call if where == "after" else None
        del call, entered, out, now, across, every, y
        x = x + self.mlp(self.norm2(x))  # type: ignore[attr-defined]
        if where == "after":
            assert reducer is not None
            x, packed = self._shrink(site, reducer, x, packed, context, seen, middle)
        trace = active()
        if trace is not None and where is None and site.entry is None:
            self._tell_all(trace, site, packed)
        x, packed = packed.complete(x) if site.layer == site.depth - 1 else (x, packed)
        if first is not None:
            note_entered(x, first)
        states = collected()
        if states is not None:
            states.append(packed)  # type: ignore[arg-type]
        return set_state(x, packed)  # type: ignore[arg-type]

    def _begin(self, site: Site, x: Tensor, layout: Layout | None) -> Packed:
        found: Any = state_of(x)
        if found is not None:
            return found
        if site.layer:
            self._enter(site, x)  # raises
        if layout is None:
            raise RuntimeError("blocks of a patched vision tower run inside its forward, which knows the image sizes")
        return Packed.entry(layout)

    def _drop_at_input(
        self, site: Site, entry: AtEntry, x: Tensor, packed: Packed, pixels: PackedPixels
    ) -> tuple[Tensor, Packed]:
        """What a method on pixels leaves for the first block."""
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            plans = packed_plans(entry, pixels, packed.layout, site.depth)
            if not all(plan.is_identity for plan in plans):
                x, packed = packed.after(x, plans, 0.0)
        if trace is not None:
            for plan, part in zip(plans, packed.parts, strict=True):
                self._tell(trace, site, part, packed, None if plan.is_identity else plan, entry.reducer.spec())
        return x, packed

    def _look(self, x: Tensor, packed: Packed, context: Context) -> PackedAsk:
        """Queries, keys and values of ``x`` without attending."""
        call, now, attn = PackedAsk(packed, None, True), context.at(packed), self.attn  # type: ignore[attr-defined]
        refuse_pre_hooks(attn)
        normed = self.norm1(x)  # type: ignore[attr-defined]
        call.queries, call.keys, call.values, call.rotated = project(attn, normed, now.rope, attn._stock)
        return call

    def _shrink(
        self, site: Site, reducer: Reducer, x: Tensor, packed: Packed, context: Context, call: PackedAsk | None,
        before: Tensor | None,
    ) -> tuple[Tensor, Packed]:  # fmt: skip
        """Let ``reducer`` plan for all views of a size at once, and apply its plans."""
        trace, parts = active(), packed.parts
        with nullcontext() if trace is None else trace.clock():
            needs = reducer.required()
            features = packed.means(x)
            entered = packed.means(before) if before is not None and "before" in needs else None
            heads: dict[str, Tensor] = {}
            windows = None
            if call is not None and call.rotated is not None:
                seen = {"queries": call.queries, "keys": call.keys, "values": call.values}
                seen |= {"turned queries": call.rotated[0], "turned keys": call.rotated[1]}
                heads = {name: packed.means(t) for name, t in seen.items() if t is not None}
                windows = packed.windows(packed.bounds(context.bounds))
            plans = []
            for i, (part, shape) in enumerate(zip(parts, packed.layout.shapes, strict=True)):
                mine = {name: part.take(t).transpose(1, 2) for name, t in heads.items()}
                got = Attended(
                    x, mine.get("queries"), mine.get("keys"), mine.get("values"),
                    (mine["turned queries"], mine["turned keys"]) if mine else None,
                )  # fmt: skip
                mask, joint, state = None, len(shape) == 3, part.state  # several frames: every unit sees its own
                if joint:
                    mask = packed.mask(i, context.bounds) if "attention" in needs else None
                elif windows is not None:
                    own = part.take(windows)
                    mask = (own[:, :, None] == own[:, None])[:, None]
                    if state.valid is not None:  # rows of slots that are not there must not be empty
                        mask = mask | ~state.valid[:, None, :, None]
                # Where frames are joined the mask has the sizes.
                view = View(state.entry, state.full_grid(site.prefix), 0.0 if joint else state.proportional, mask)
                before_units = None if entered is None else part.take(entered)
                plans.append(reducer.plan(self._evidence(site, part.take(features), state, got, before_units, view)))
            if not all(plan.is_identity for plan in plans):
                x, packed = packed.after(x, plans, reducer.size_power)
        if trace is not None:
            for plan, part in zip(plans, packed.parts, strict=True):
                self._tell(trace, site, part, packed, None if plan.is_identity else plan, reducer.spec())
        return x, packed


class ReducedQwen2Block(PackedBlock, qwen2.Qwen2VLVisionBlock):
    pass


class ReducedQwen25Block(PackedBlock, qwen2_5.Qwen2_5_VLVisionBlock):
    pass


class ReducedQwen3Block(PackedBlock, qwen3.Qwen3VLVisionBlock):
    pass
