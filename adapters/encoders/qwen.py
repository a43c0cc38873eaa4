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
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from tokenreduce.adapters.encoders.packed import Layout
from tokenreduce.adapters.encoders.packed_outputs import expand_states, expand_tokens, give_rebuilt
from tokenreduce.adapters.encoders.packed_pixels import PackedPixels
from tokenreduce.adapters.encoders.qwen_attention import (
    ReducedQwen2Attention,
    ReducedQwen3Attention,
    ReducedQwen25Attention,
)
from tokenreduce.adapters.encoders.qwen_blocks import (
    LAYOUT,
    PIXELS,
    ReducedQwen2Block,
    ReducedQwen3Block,
    ReducedQwen25Block,
)
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "towers"]

#: Our towers' outputs have all their patches by themselves.
EXPANDS = True
EVIDENCE = ("keys", "queries", "values", "attention", "before")


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
