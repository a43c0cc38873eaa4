"""What the vision tower of an image/video language model saw, carried to the entry of its language model.

``generate`` runs ``get_image_features`` before the model's forward, and repeats its result for beams. Both ways are one
here: that method is wrapped in a subclass, hooks inside it collect queries and keys of the blocks that a method looks
at (and what enters the projector), and the wrapper puts all of it on the object that the method returns, which
``generate`` hands on. Within a plain forward the same object waits in a context variable. Nothing is kept on modules.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, listen
from tokenreduce.adapters.encoders.joint import FRAMES
from tokenreduce.adapters.encoders.state import collect_states
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.projector.entries import entries
from tokenreduce.adapters.language.projector.seen import (
    ARRIVING,
    WATCHING,
    Encoded,
    PackedCall,
    Vision,
    encoded_in,
    put_on,
)
from tokenreduce.adapters.language.projector.through import attach_through, through_of
from tokenreduce.core.evidence import Look, PoolingHead, resolve
from tokenreduce.core.undo import Undo

__all__ = ["attach_tower_evidence", "encode", "encoded_in", "vision_of"]

#: Where a model has the blocks whose evidence is gathered, and what else.
_WATCH = "_tokenreduce_watch"

#: Inner model class -> (towers, blocks in them, projector, kind).
PARTS: dict[str, tuple[tuple[str, ...], str, str | None, str]] = {
    "LlavaModel": (("vision_tower",), "encoder.layers", "multi_modal_projector", "plain"),
    "LlavaNextModel": (("vision_tower",), "encoder.layers", "multi_modal_projector", "tiled"),
    "LlavaNextVideoModel": (("vision_tower",), "encoder.layers", "multi_modal_projector", "tiled"),
    "LlavaOnevisionModel": (("vision_tower",), "encoder.layers", "multi_modal_projector", "tiled"),
    "VideoLlavaModel": (("image_tower", "video_tower"), "encoder.layers", "multi_modal_projector", "plain"),
    "Qwen2VLModel": (("visual",), "blocks", None, "packed"),
    "Qwen2_5_VLModel": (("visual",), "blocks", None, "packed"),
    "Qwen3VLModel": (("visual",), "blocks", None, "packed"),
    "InternVLModel": (("vision_tower",), "encoder.layer", None, "shuffled"),
    "Idefics3Model": (("vision_model",), "encoder.layers", None, "shuffled"),
    "SmolVLMModel": (("vision_model",), "encoder.layers", None, "shuffled"),
    "PaliGemmaModel": (("vision_tower",), "encoder.layers", "multi_modal_projector", "plain"),
    "Gemma3Model": (("vision_tower",), "encoder.layers", None, "pooled"),
}
#: Where tower classes other than CLIP and SigLIP keep their blocks.
_BLOCKS = {"ViTModel": "layers", "Dinov2Model": "encoder.layer", "Dinov2WithRegistersModel": "encoder.layer"}
#: Where SigLIP towers keep their pooling head, in newer and older releases.
_HEADS = ("head", "vision_model.head")
_WITH_CLASS = ("CLIPVisionModel", "InternVLVisionModel", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel")


def vision_of(inner: Any) -> Vision | None:
    """The vision part of ``inner``, None for a tower whose blocks are not known (evidence of it cannot be gathered)."""
    if type(inner).__name__ not in PARTS:
        return None
    names, path, projector, kind = PARTS[type(inner).__name__]
    towers = tuple(inner.get_submodule(n) for n in names)
    blocks = []
    for tower in towers:
        try:
            found = tower.get_submodule(_BLOCKS.get(type(tower).__name__, path))
        except AttributeError:
            return None
        blocks.append(tuple(found.children()))
    if not all(blocks) or any(_attention_of(b[0]) is None for b in blocks):
        return None
    cls = type(towers[0]).__name__ in _WITH_CLASS
    depth = len(blocks[0])
    module = None if projector is None else inner.get_submodule(projector)
    through, unit = through_of(inner, kind, module)
    return Vision(
        towers, tuple(blocks), module, kind, cls, _feature_block(inner.config, depth),
        hasattr(inner, "get_video_features"), _heads(towers), through=through, unit=unit,
    )  # fmt: skip


def _heads(towers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The pooling heads of ``towers``; none unless each has one with a query of its own."""
    named = [dict(tower.named_modules()) for tower in towers]
    found = [next((m[n] for n in _HEADS if hasattr(m.get(n), "probe")), None) for m in named]
    return () if None in found else tuple(found)


def _attention_of(block: Any) -> Any:
    for name in ("self_attn", "attention", "attn"):
        if (attn := getattr(block, name, None)) is not None:
            return getattr(attn, "attention", attn)
    return None


def _feature_block(config: Any, depth: int) -> int:
    """The block behind ``hidden_states[vision_feature_layer]``, of which there is one more than there are blocks."""
    layer = getattr(config, "vision_feature_layer", None)
    layer = layer[-1] if isinstance(layer, list | tuple) and layer else layer
    if not isinstance(layer, int):
        return depth - 1
    return max(layer % (depth + 1) - 1, 0)


# -- hooks -----------------------------------------------------------------------------------------------------------
def attach_tower_evidence(found: Language, looks: tuple[Look, ...], more: tuple[str, ...], undo: Undo) -> None:
    """Gather evidence of the tower blocks ``looks`` in every call, and of ``more`` what is "pixels" or "head". Raises
    ``ValueError`` for a block that is not there."""
    vision = found.vision
    assert vision is not None
    wanted = tuple(sorted({resolve(look, vision.depth, vision.feature) for look in looks}))
    inner: Any = found.inner
    for mixin in (WatchedImages, WatchedVideos):
        if not any(hasattr(inner, name) for name in vars(mixin) if name.startswith("get_")):
            continue
        undo.mix_in(inner, mixin)
    undo.set(inner, _WATCH, (wanted, more))
    for tower, blocks in zip(vision.towers, vision.blocks, strict=True):
        undo.pre_hook(tower, before_tower)
        undo.hook(tower, after_tower)
        copies: dict[int, Any] = {}
        for b in wanted:
            attn = _attention_of(blocks[b])
            if vision.kind == "packed":
                undo.pre_hook(attn, functools.partial(watch_packed, block=b))
                undo.hook(attn.qkv, functools.partial(watch_qkv, block=b))
            else:
                if "_tokenreduce_stock" not in vars(attn):  # a method inside the tower listens already
                    listen(attn, undo, copies)
                undo.pre_hook(attn, functools.partial(watch, block=b))
    if vision.projector is not None:
        undo.pre_hook(vision.projector, watch_projector)
    if "through" in more:
        attach_through(vision, undo)
    for head in vision.heads if "head" in more else ():
        undo.hook(head, watch_head)


class WatchedImages(nn.Module):
    """Mixin of models with ``get_image_features``."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return encode(self, "image", super().get_image_features, args, kwargs)  # type: ignore[misc]


class WatchedVideos(nn.Module):
    """Mixin of models with ``get_video_features``."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return encode(self, "video", super().get_video_features, args, kwargs)  # type: ignore[misc]


def encode(inner: Any, kind: str, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``get_image_features`` or ``get_video_features`` of ``inner`` with what its tower saw put on the result."""
    if WATCHING.get() is not None:  # Qwen3-VL's videos go through its get_image_features
        return stock(*args, **kwargs)
    blocks, more = inner.__dict__[_WATCH]
    vision = vision_of(inner)
    assert vision is not None
    seen = Encoded(vision, blocks, wanted=more)
    token = WATCHING.set(seen)
    clip = FRAMES.set(_frames(args, kwargs) if kind == "video" else 1)
    try:
        with collect_states() as seen.states:
            output = stock(*args, **kwargs)
    finally:
        FRAMES.reset(clip)
        WATCHING.reset(token)
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    features = output.pooler_output if hasattr(output, "pooler_output") else None
    if features is None:  # a tuple was asked for, which carries nothing
        return output
    seen.entries = entries(inner, kind, seen, features, given)
    if seen.own is not None and seen.features is not None and seen.own.shape[-1] != seen.features.shape[-1]:
        seen.own = None  # several layers side by side
    put_on(output, seen)
    arriving = ARRIVING.get()
    if arriving is not None:
        arriving[kind] = seen
    return output


def _frames(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Frames of every video in pixels (videos,frames,channels,rows,columns); 1 for pixels of another layout."""
    return next((t.shape[1] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 5), 1)


def before_tower(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen = WATCHING.get()
    if seen is None:
        return
    if "pixels" in seen.wanted:
        seen.given = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        size = tower.config.patch_size
        seen.patch = size if isinstance(size, int) else size[0]
    if seen.vision.kind == "packed":
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        seen.tower_kwargs["grid_thw"] = grids
        if hasattr(tower, "fullatt_block_indexes"):
            index = sys.modules[type(tower).__module__].get_vision_window_index(  # type: ignore[attr-defined]
                grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
            )[0]
            seen.tower_kwargs["window_index"] = index


def after_tower(tower: Any, args: tuple[Any, ...], output: Any) -> None:
    """Keep class-token features of the layer that enters the projector."""
    seen = WATCHING.get()
    if seen is None or seen.vision.kind == "packed":
        return
    states = getattr(output, "hidden_states", None)
    if seen.vision.cls and states is not None and len(states) > seen.vision.feature + 1:
        state = states[seen.vision.feature + 1]
        if state is None:  # the caller asked for another layer; the library keeps only those
            there = [s for s in states if s is not None]
            state = there[0] if len(there) == 1 else None
        seen.own = None if state is None else state[:, 0]


def watch(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, block: int) -> Any:
    """Pre-hook on an attention module: have its queries and keys recorded."""
    seen = WATCHING.get()
    if seen is None:
        return None
    call = next((c for c in (*args, *kwargs.values()) if isinstance(c, Call)), None)
    if call is None:
        name = "attention_mask" if "attention_mask" in inspect.signature(type(attn).forward).parameters else CALL
        call = Call(args[1] if len(args) > 1 else kwargs.get("attention_mask"), record=True)
        args, kwargs = args[:1], {**kwargs, name: call}
    call.record = True
    seen.calls[block] = call
    return args, kwargs


def watch_packed(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, block: int) -> None:
    seen = WATCHING.get()
    if seen is not None:
        packed = getattr(kwargs.get(CALL), "packed", None)  # a method acts in the tower
        seen.tower_kwargs[f"at {block}"] = (attn, kwargs["cu_seqlens"], kwargs["position_embeddings"], packed)


def watch_qkv(qkv: Any, args: tuple[Any, ...], output: Tensor, *, block: int) -> None:
    """Hook on a Qwen block's projection: queries and keys behind RoPE, in the order of the merger's output."""
    seen = WATCHING.get()
    noted = None if seen is None else seen.tower_kwargs.pop(f"at {block}", None)
    if seen is None or noted is None:  # a method in the tower asks for them before the attention
        return
    attn, bounds, (cos, sin), packed = noted
    p = output.shape[0]
    q, k, _ = output.detach().view(p, 3, attn.num_heads, -1).unbind(1)
    q, k = _turn(attn)(q, k, cos, sin)
    window = None
    if packed is not None:
        units = packed.windows(bounds)
        window = None if units is None else units.repeat_interleave(packed.layout.unit)
        seen.calls[block] = PackedCall(q.transpose(0, 1), k.transpose(0, 1), window, packed)
        return
    index = seen.tower_kwargs.get("window_index")
    if index is not None:
        lengths = bounds.diff().long()
        frames = _frame_lengths(seen.tower_kwargs["grid_thw"])
        if lengths.tolist() != frames:
            window = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths.to(q.device))
        unit = p // len(index)
        back = index.to(q.device).argsort()[:, None] * unit + torch.arange(unit, device=q.device)
        back = back.flatten()
        q, k = q[back], k[back]
        window = None if window is None else window[back]
    seen.calls[block] = PackedCall(q.transpose(0, 1), k.transpose(0, 1), window)


def _turn(attn: Any) -> Any:
    """The rotary function of a Qwen attention module, whose class a method in the tower may have swapped."""
    modules = (sys.modules[kind.__module__] for kind in type(attn).__mro__)
    return next(f for m in modules if (f := getattr(m, "apply_rotary_pos_emb_vision", None)) is not None)


def watch_projector(projector: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen = WATCHING.get()
    if seen is not None:
        seen.features = args[0] if args else next(iter(kwargs.values()))


def watch_head(head: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """Hook on a SigLIP tower's pooling head: the attention of its query to the patches, mean over heads."""
    seen = WATCHING.get()
    if seen is None:
        return
    x, attn = args[0].detach(), head.attention
    with torch.no_grad():
        (wq, wk, _), (bq, bk, _) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        q, k = (nn.functional.linear(t, w, b) for t, w, b in ((head.probe[0], wq, bq), (x, wk, bk)))
        q, k = (t.float().unflatten(-1, (attn.num_heads, -1)).transpose(-3, -2) for t in (q, k))
        rows = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    seen.pooled = PoolingHead(rows.mean(1)[:, 0], output.detach())


def _frame_lengths(grids: Tensor) -> list[int]:
    return [h * w for t, h, w in grids.tolist() for _ in range(t)]
