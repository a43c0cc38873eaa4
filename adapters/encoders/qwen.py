"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose patches are packed over images and frames.

A method sees the 2x2 units of patches that become one visual token each, view by view
(:mod:`tokenreduce.adapters.encoders.packed`). A unit's features, keys, queries and values are the means over its
patches, so its
attention logits are the means over pairs of patches. Keys are those before RoPE. In blocks with window attention
(Qwen2.5-VL) rows are over the window, and units merge across windows all the same. A plan that a method makes on units
is applied to them as vectors of all their patches: the first patch of a merged unit is what the plan makes of the first
ones, and so on.

Blocks and their attention modules are swapped. Behind a cut the stock attention gets the lengths of windows and frames
that are left and the rotary angles of representatives. Where units have sizes (proportional attention), it is
computed here, window by window with their logarithms as key bias, and by sdpa where the model uses flash attention.
Methods that hand on their attention map have it computed anew: a map over units is none over patches.

The mergers (also DeepStack's) see the units that are left, and their output is expanded to all: what stands behind
them counts on it. Without a language model behind it, a tower so returns copies of merged units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from tokenreduce.adapters.encoders.block import Attended, Reduced, Site, View, _collected
from tokenreduce.adapters.encoders.hf_attention import CALL, Call
from tokenreduce.adapters.encoders.packed import Layout, Packed
from tokenreduce.adapters.encoders.packed_outputs import expand_states, expand_tokens, give_rebuilt
from tokenreduce.adapters.encoders.packed_pixels import PackedPixels, packed_plans
from tokenreduce.adapters.encoders.packed_rebuilding import SetsAside
from tokenreduce.adapters.encoders.pixels import AtEntry
from tokenreduce.adapters.encoders.rebuilding import note_entered
from tokenreduce.adapters.encoders.state import set_state, state_of
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched, refuse_pre_hooks
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import active
from tokenreduce.core.undo import Undo

__all__ = ["attach", "towers"]

#: Our towers' outputs have all their patches by themselves.
EXPANDS = True
EVIDENCE = ("keys", "queries", "values", "attention", "before")
_SEEN = frozenset(("keys", "queries", "values", "attention"))
#: Keyword under which the layout of a call travels from the tower to its blocks.
LAYOUT = "tokenreduce_layout"
#: Keyword under which the pixels of a call travel there, where a method looks at them.
PIXELS = "tokenreduce_pixels"


class PackedAsk(Call):
    """One call of a packed attention module: ``mask`` is a bias (P,) to add to the logits, or None; ``seen`` are the
    keys of every window with their bias where these are others than its own patches. Queries, keys, values and
    ``rotated`` come as (P,H,d)."""

    __slots__ = ("packed", "seen")

    def __init__(
        self, packed: Packed, bias: Tensor | None, record: bool, seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        super().__init__(bias, bias=bias is not None, record=record)
        self.packed, self.seen = packed, seen


# -- attention ---------------------------------------------------------------------------------------------------------
class _Attention(nn.Module):
    """Mixin: the stock attention, or its own steps with a bias and with queries and keys shown."""

    _stock: ModuleType

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        call: PackedAsk | None = kwargs.pop(CALL, None)
        if call is None or (call.mask is None and call.seen is None and not call.record):
            if max_seqlen is not None:
                kwargs["max_seqlen"] = max_seqlen
            out: Tensor = super().forward(
                hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
            return out
        assert position_embeddings is not None
        attn: Any = self
        q, k, v, rotated = project(attn, hidden_states, position_embeddings, self._stock)
        if call.record:
            call.queries, call.keys, call.values, call.rotated = q, k, v, rotated
        name = attn.config._attn_implementation
        if (call.mask is not None or call.seen is not None) and name not in ("sdpa", "eager"):
            name = "sdpa"
        compute: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, self._stock.eager_attention_forward)
        settings = {
            "scaling": attn.scaling, "dropout": attn.attention_dropout if self.training else 0.0, "is_causal": False,
            **kwargs,
        }  # fmt: skip
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (*rotated, v))
        if "flash" in name:
            longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
            heads = compute(
                self, q, k, v, attention_mask=None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens,
                max_length_q=longest, max_length_k=longest, **settings,
            )[0]  # fmt: skip
        else:
            lengths = cu_seqlens.diff().tolist()
            windows: Any
            if call.seen is not None:
                windows = (
                    (part, k[:, :, where], v[:, :, where], bias.to(q.dtype)[None, None, None])
                    for part, (where, bias) in zip(q.split(lengths, 2), call.seen, strict=True)
                )
            else:
                added = [None] * len(lengths)
                if call.mask is not None:
                    added = list(call.mask.to(q.dtype)[None, None, None].split(lengths, 3))
                windows = zip(*(t.split(lengths, 2) for t in (q, k, v)), added, strict=True)
            heads = torch.cat([compute(self, a, b, c, attention_mask=w, **settings)[0] for a, b, c, w in windows], 1)
        out = attn.proj(heads.reshape(len(hidden_states), -1).contiguous())
        return out


def project(
    attn: Any, x: Tensor, rope: tuple[Tensor, Tensor], stock: ModuleType
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries, keys and values (P,H,d) of normed features (P,C), and queries and keys behind RoPE."""
    q, k, v = attn.qkv(x).reshape(len(x), 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    return q, k, v, stock.apply_rotary_pos_emb_vision(q, k, *rope)


class ReducedQwen2Attention(_Attention, qwen2.VisionAttention):
    _stock = qwen2


class ReducedQwen25Attention(_Attention, qwen2_5.Qwen2_5_VLVisionAttention):
    _stock = qwen2_5


class ReducedQwen3Attention(_Attention, qwen3.Qwen3VLVisionAttention):
    _stock = qwen3


# -- blocks ------------------------------------------------------------------------------------------------------------
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


class _Block(SetsAside, Reduced):
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
        collected = _collected()
        if collected is not None:
            collected.append(packed)  # type: ignore[arg-type]
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


class ReducedQwen2Block(_Block, qwen2.Qwen2VLVisionBlock):
    pass


class ReducedQwen25Block(_Block, qwen2_5.Qwen2_5_VLVisionBlock):
    pass


class ReducedQwen3Block(_Block, qwen3.Qwen3VLVisionBlock):
    pass


# -- the tower ---------------------------------------------------------------------------------------------------------
def lay_out(
    tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, frames: int = 1, looks: Reducer | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook on a tower: where the units of every view are goes to its blocks; ``frames`` of a video as one. Pixels
    go with it where a method ``looks`` at them."""
    grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    order = kwargs.get("window_index")
    if order is None and hasattr(tower, "fullatt_block_indexes"):
        order = qwen2_5.get_vision_window_index(  # type: ignore[attr-defined]
            grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )[0]
    if not args:
        kwargs = dict(kwargs)
        args = (kwargs.pop("hidden_states"),)
    pixels = args[0]
    layout = Layout.of(grids.tolist(), tower.spatial_merge_size, order, pixels.device, frames)
    more: dict[str, Any] = {LAYOUT: layout}
    if looks is not None:
        across = bool(getattr(looks, "temporal", False))
        more[PIXELS] = PackedPixels.of(
            tower.patch_embed, pixels, grids.tolist(), tower.spatial_merge_size, order, across
        )
    return args, {**kwargs, **more}


#: Tower class -> (title, block class, patched block, attention class, patched attention).
FAMILIES: dict[type, tuple[str, type, type, type, type]] = {
    qwen2.Qwen2VisionTransformerPretrainedModel: (
        "Qwen2-VL", qwen2.Qwen2VLVisionBlock, ReducedQwen2Block, qwen2.VisionAttention, ReducedQwen2Attention,
    ),
    qwen2_5.Qwen2_5_VisionTransformerPretrainedModel: (
        "Qwen2.5-VL", qwen2_5.Qwen2_5_VLVisionBlock, ReducedQwen25Block, qwen2_5.Qwen2_5_VLVisionAttention,
        ReducedQwen25Attention,
    ),
    qwen3.Qwen3VLVisionModel: (
        "Qwen3-VL", qwen3.Qwen3VLVisionBlock, ReducedQwen3Block, qwen3.Qwen3VLVisionAttention, ReducedQwen3Attention,
    ),
}  # fmt: skip


def towers(model: nn.Module) -> Iterator[Tower]:
    """Qwen vision towers inside ``model``; their tokens are units of 2x2 patches, as many as the image has."""
    for name, module in model.named_modules():
        family = FAMILIES.get(type(module))
        if family is None:
            continue
        title, block, patched, _, _ = family
        blocks: Any = module.blocks
        yield Tower(
            name, module, f"transformers {title} tower", tuple(blocks), {block: patched}, 0, False, None,
            (*EVIDENCE, "pixels"), "pre", resizes=False,
        )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a Qwen tower.

    Raises ``TypeError`` for block or attention classes that are not known, ``ValueError`` for ``resize`` and modules
    with a forward of their own on the instance.
    """
    module: Any = tower.module
    _, _, _, stock, patched = FAMILIES[type(module)]
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            raise ValueError(
                f"{reducer.name} cannot act on {tower.family}, whose processor cuts images into patches: give the "
                f"processor a smaller max_pixels instead"
            )
    for block in tower.blocks:
        if type(block.attn) is not stock:
            raise TypeError(
                f"{tower.family}: attention class {type(block.attn).__name__} is not supported; "
                f"supported: {stock.__name__}"
            )
        refuse_own(block.attn)  # type: ignore[arg-type]
        refuse_patched(stock)
    attach_tower(tower, reducers, undo)
    for block in tower.blocks:
        undo.swap_class(block.attn, patched)  # type: ignore[arg-type]
    frames, looks = max(getattr(r, "frames", 1) for r in reducers), [r for r in reducers if r.drops_at_input]
    undo.pre_hook(module, functools.partial(lay_out, frames=frames, looks=looks[0] if looks else None))
    for merger in (module.merger, *getattr(module, "deepstack_merger_list", ())):
        if any(reducer.rebuilds for reducer in reducers):
            undo.pre_hook(merger, give_rebuilt)
        undo.hook(merger, expand_tokens)
    undo.hook(module, expand_states)
