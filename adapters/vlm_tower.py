"""What the vision tower of an image/video language model saw, carried to the entry of its language model.

``generate`` runs ``get_image_features`` before the model's forward, and repeats its result for beams. Both ways are one
here: that method is wrapped on the instance, hooks inside it collect queries and keys of the blocks that a method looks
at (and what enters the projector), and the wrapper puts all of it on the object that the method returns, which
``generate`` hands on. Within a plain forward the same object waits in a context variable. Nothing is kept on modules.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenreduce.adapters.encoder import State, collect_states, full_plan
from tokenreduce.adapters.hf_attention import CALL, Call, listen
from tokenreduce.adapters.packed import Packed
from tokenreduce.adapters.vlm_encoder import remaining, sizes
from tokenreduce.adapters.vlm_origin import blocks_of_patches, grid, pooled, tiled, with_class, with_end
from tokenreduce.evidence import Evidence, Look
from tokenreduce.patching import Undo
from tokenreduce.plan import Plan
from tokenreduce.visual import Origin, resolve

if TYPE_CHECKING:
    from tokenreduce.adapters.vlm import Language

__all__ = ["ARRIVING", "Encoded", "Entry", "Vision", "attach_tower_evidence", "encoded_in", "vision_of"]

_ON_OUTPUT = "_tokenreduce_encoded"
_WATCHING: ContextVar[Encoded | None] = ContextVar("tokenreduce_watching", default=None)
#: Where get_image_features leaves what it saw for the forward that called it.
ARRIVING: ContextVar[dict[str, Encoded] | None] = ContextVar("tokenreduce_arriving", default=None)


@dataclass(frozen=True)
class Vision:
    """The parts of a family between pixels and language model."""

    towers: tuple[nn.Module, ...]
    blocks: tuple[tuple[nn.Module, ...], ...]
    projector: nn.Module | None
    #: How tokens are made of patches: "plain", "tiled", "shuffled", "pooled" or "packed".
    kind: str
    cls: bool
    #: Block whose output enters the projector.
    feature: int

    @property
    def depth(self) -> int:
        return len(self.blocks[0])

    @property
    def evidence(self) -> tuple[str, ...]:
        given = ["tower", "text"]
        given += ["cls"] if self.cls else []
        given += ["clip"] if self.cls and self.projector is not None else []
        given += ["crops"] if self.kind == "tiled" else []
        return tuple(given)


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
_WITH_CLASS = ("CLIPVisionModel", "InternVLVisionModel", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel")


def vision_of(inner: Any) -> Vision | None:
    """The vision part of ``inner``, None for a tower whose blocks are not known (evidence of it cannot be gathered)."""
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
    return Vision(
        towers, tuple(blocks), None if projector is None else inner.get_submodule(projector), kind, cls,
        _feature_block(inner.config, depth),
    )  # fmt: skip


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


# -- what was seen ---------------------------------------------------------------------------------------------------
@dataclass
class Entry:
    """One image (or tile, or video): where its tokens come from, its first view, and its rows among what entered the
    projector, None where tokens have no such row of their own."""

    origin: Origin
    first: int
    rows: Tensor | None = None


@dataclass
class Encoded:
    """What a call of ``get_image_features`` or ``get_video_features`` saw."""

    vision: Vision
    blocks: tuple[int, ...]
    calls: dict[int, Any] = field(default_factory=dict)
    #: (views,n,C) what entered the projector.
    features: Tensor | None = None
    #: (views,C) class-token features.
    own: Tensor | None = None
    entries: list[Entry] = field(default_factory=list)
    #: Packed towers: first patch and number of patches of every view.
    spans: list[tuple[int, int]] = field(default_factory=list)
    tower_kwargs: dict[str, Any] = field(default_factory=dict)
    #: After every block, where a method acts in the tower.
    states: list[Any] = field(default_factory=list)

    @property
    def reduced(self) -> State | Packed | None:
        """The tokens that enter the projector, None when all patches do."""
        state = self.states[self.vision.feature] if len(self.states) > self.vision.feature else None
        if isinstance(state, Packed):
            return None if state.at is None else state
        return state if state is not None and state.plans else None

    def left(self, views: Tensor) -> Tensor | None:
        """(V,patches) bool of ``views`` (V,), which all have as many patches: those that are the place of a token that
        a method in the tower left; None when all are."""
        state = self.reduced
        if isinstance(state, Packed):
            return state.left(views)
        marks = remaining(state, int(self.vision.cls))
        return None if marks is None else marks[views]

    def sizes(self, views: Tensor) -> Tensor | None:
        """(V,patches) how many tokens of the tower's entry are in the one that every patch of ``views`` (V,) is in;
        None when each is one."""
        state = self.reduced
        if isinstance(state, Packed):
            return state.sizes(views)
        number = sizes(state, int(self.vision.cls))
        return None if number is None else number[views]

    def _at(self, block: int, tokens: int) -> State | None:
        """The tokens that the attention of ``block`` saw; methods act before or behind it."""
        for state in (self.states[block - 1] if block and self.states else None, *self.states[block : block + 1]):
            if state is not None and state.plans and full_plan(state).k == tokens:  # type: ignore[union-attr]
                return state
        return None

    @property
    def tokens(self) -> int:
        return sum(e.origin.n for e in self.entries)

    def evidence(self, block: int, views: Tensor) -> Evidence:
        """Evidence of a tower block for ``views`` (V,), which all have as many patches."""
        call = self.calls[block]
        if self.vision.kind == "packed":
            return call.evidence(block, [self.spans[v] for v in views.tolist()], views, self.vision.depth)
        q, k = (call.queries, call.keys) if call.rotated is None else call.rotated
        state = self._at(block, k.shape[2])

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[views]

        return Evidence(
            k.detach()[views].transpose(1, 2).flatten(2), k.detach()[views], q.detach()[views],
            size=None if state is None else rows(state.size), valid=None if state is None else rows(state.valid),
            protected=int(self.vision.cls), cls=self.vision.cls, layer=block, depth=self.vision.depth,
            proportional=state is not None and state.proportional,
        )  # fmt: skip


    def plan_at(self, block: int, views: Tensor) -> Plan | None:
        """The plan from the patches at the tower's entry to those that ``block`` saw, None when they are all there."""
        call = self.calls[block]
        if isinstance(call, PackedCall):
            return None if call.packed is None else call.packed.patches(views)[2]
        if not self.states:
            return None
        state = self._at(block, call.keys.shape[2])
        plan = None if state is None else full_plan(state)
        return None if plan is None else plan.rows_at(views)


@dataclass
class PackedCall:
    """Queries and keys of a Qwen tower's block, packed over images and frames, in the order of the merger's output;
    of the tower where a method acts in there, which ``packed`` then describes."""

    queries: Tensor  # (H,P,d) behind RoPE
    keys: Tensor
    #: (P,) window of every patch, None where a frame is one window.
    window: Tensor | None
    packed: Packed | None = None

    def evidence(self, block: int, spans: list[tuple[int, int]], views: Tensor, depth: int) -> Evidence:
        """Evidence on the patches of ``views`` (V,), each with its first patch and number of patches in ``spans``."""
        state = None
        if self.packed is None:
            where = torch.tensor([s for s, _ in spans], device=self.keys.device)[:, None]
            where = where + torch.arange(spans[0][1], device=self.keys.device)
        else:
            where, state, _ = self.packed.patches(views)
        q, k = (t[:, where].transpose(0, 1) for t in (self.queries, self.keys))
        valid = None if state is None else state.valid
        mask = None
        if self.window is not None:
            w = self.window[where]
            mask = (w[:, :, None] == w[:, None, :])[:, None]
            if valid is not None:  # rows of slots that are not there must not be empty
                mask = mask | ~valid[:, None, :, None]
        return Evidence(
            k.transpose(1, 2).flatten(2), k, q, mask=mask, cls=False, rope="post", layer=block, depth=depth,
            size=None if state is None else state.size, valid=valid,
            proportional=state is not None and state.proportional,
        )  # fmt: skip


def encoded_in(output: Any) -> Encoded | None:
    """What :func:`encode` left on an output of ``get_image_features``."""
    return getattr(output, _ON_OUTPUT, None)


# -- hooks -----------------------------------------------------------------------------------------------------------
def attach_tower_evidence(found: Language, looks: tuple[Look, ...], undo: Undo) -> None:
    """Gather evidence of the tower blocks ``looks`` in every call. Raises ``ValueError`` for a block that is not there."""
    vision = found.vision
    assert vision is not None
    wanted = tuple(sorted({resolve(look, vision.depth, vision.feature) for look in looks}))
    inner: Any = found.inner
    for kind in ("image", "video"):
        name = f"get_{kind}_features"
        if not hasattr(inner, name):
            continue
        wrapped = functools.partial(encode, inner, kind, wanted)
        wrapped.__signature__ = inspect.signature(getattr(inner, name))  # type: ignore[attr-defined]
        undo.set(inner, name, wrapped)
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


def encode(inner: Any, kind: str, blocks: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """``get_image_features`` or ``get_video_features`` of ``inner`` with what its tower saw put on the result."""
    name = f"get_{kind}_features"
    stock = getattr(type(inner), name)
    if _WATCHING.get() is not None:  # Qwen3-VL's videos go through its get_image_features
        return stock(inner, *args, **kwargs)
    vision = vision_of(inner)
    assert vision is not None
    seen = Encoded(vision, blocks)
    token = _WATCHING.set(seen)
    try:
        with collect_states() as seen.states:
            output = stock(inner, *args, **kwargs)
    finally:
        _WATCHING.reset(token)
    given = inspect.signature(stock).bind(inner, *args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    features = output.pooler_output if hasattr(output, "pooler_output") else None
    if features is None:  # a tuple was asked for, which carries nothing
        return output
    seen.entries = _entries(inner, kind, seen, features, given)
    setattr(output, _ON_OUTPUT, seen)
    arriving = ARRIVING.get()
    if arriving is not None:
        arriving[kind] = seen
    return output


def before_tower(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen = _WATCHING.get()
    if seen is None:
        return
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
    seen = _WATCHING.get()
    if seen is None or seen.vision.kind == "packed":
        return
    states = getattr(output, "hidden_states", None)
    if seen.vision.cls and states is not None and len(states) > seen.vision.feature + 1:
        seen.own = states[seen.vision.feature + 1][:, 0]


def watch(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, block: int) -> Any:
    """Pre-hook on an attention module: have its queries and keys recorded."""
    seen = _WATCHING.get()
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
    seen = _WATCHING.get()
    if seen is not None:
        packed = getattr(kwargs.get(CALL), "packed", None)  # a method acts in the tower
        seen.tower_kwargs[f"at {block}"] = (attn, kwargs["cu_seqlens"], kwargs["position_embeddings"], packed)


def watch_qkv(qkv: Any, args: tuple[Any, ...], output: Tensor, *, block: int) -> None:
    """Hook on a Qwen block's projection: queries and keys behind RoPE, in the order of the merger's output."""
    seen = _WATCHING.get()
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
    seen = _WATCHING.get()
    if seen is not None:
        seen.features = args[0] if args else next(iter(kwargs.values()))


def _frame_lengths(grids: Tensor) -> list[int]:
    return [h * w for t, h, w in grids.tolist() for _ in range(t)]


# -- origins ---------------------------------------------------------------------------------------------------------
def _entries(inner: Any, kind: str, seen: Encoded, features: Any, given: dict[str, Any]) -> list[Entry]:
    """The images of a call, in the order of their placeholders."""
    vision = seen.vision
    if vision.kind == "packed":
        return _packed(inner, seen)
    call = next(iter(seen.calls.values()), None)
    device = features[0].device
    config = inner.config.vision_config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    side = size // patch
    if seen.states or call is not None:
        patches = (seen.states[0].entry if seen.states else call.keys.shape[2]) - int(vision.cls)  # type: ignore[union-attr]
        side = math.isqrt(patches) if side * side != patches else side
    n = side * side
    if kind == "video" and vision.kind != "shuffled":
        return _videos(inner, seen, side, features, given, device)
    if vision.kind == "tiled":
        return _tiles(inner, side, features, given, device)
    if vision.kind == "shuffled":
        r = round(1 / inner.config.downsample_ratio) if hasattr(inner.config, "downsample_ratio") else (
            inner.config.scale_factor
        )
        one = blocks_of_patches(side, side, r, packed=False, device=device)
        count = sum(f.shape[0] if f.dim() == 2 else f.shape[0] * f.shape[1] for f in features) // one.n
        return [Entry(one, v) for v in range(count)]
    if vision.kind == "pooled":
        pool = inner.multi_modal_projector.avg_pool
        one = pooled(lambda t: pool(t.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2), n, device)
        return [Entry(one, v) for v in range(len(features))]
    one = grid(side, side, device)
    one = with_class(one) if features[0].shape[0] == n + 1 else one
    rows = torch.arange(one.n, device=device)
    return [Entry(one, v, rows + v * one.n) for v in range(len(features))]


def _packed(inner: Any, seen: Encoded) -> list[Entry]:
    merge = inner.visual.spatial_merge_size
    out: list[Entry] = []
    device = inner.visual.device
    start = 0
    known: dict[tuple[int, int, int], Origin] = {}
    for t, h, w in seen.tower_kwargs["grid_thw"].tolist():
        if (t, h, w) not in known:
            known[t, h, w] = blocks_of_patches(h, w, merge, packed=True, device=device).repeat(t)
        out.append(Entry(known[t, h, w], len(seen.spans)))
        for _ in range(t):
            seen.spans.append((start, h * w))
            start += h * w
    return out


def _tiles(inner: Any, side: int, features: Any, given: dict[str, Any], device: Any) -> list[Entry]:
    sizes = torch.as_tensor(given["image_sizes"]).tolist()
    config = inner.config
    pinpoints, size = config.image_grid_pinpoints, config.vision_config.image_size
    parameters = inspect.signature(inner.pack_image_features).parameters
    alone = _unpatched(given.get("batch_num_images"), len(sizes))
    out, first, row, known = [], 0, 0, {}
    n = side * side
    for i, image_size in enumerate(sizes):
        key = (tuple(image_size), alone[i])
        if key not in known:
            crops = (1, 1) if alone[i] else tuple(map(int, get_anyres_image_grid_shape(image_size, pinpoints, size)))
            views = 1 if alone[i] else crops[0] * crops[1] + 1
            more: dict[str, Any] = {}
            if "vision_feature_select_strategy" in parameters:
                more["vision_feature_select_strategy"] = config.vision_feature_select_strategy
            if "vision_aspect_ratio" in parameters and given.get("vision_aspect_ratio") is not None:
                more["vision_aspect_ratio"] = given["vision_aspect_ratio"]

            def pack(t: Tensor, image_size: Any = image_size, more: dict[str, Any] = more) -> Tensor:
                end = torch.zeros(t.shape[-1], device=t.device)
                packed: Tensor = inner.pack_image_features([t], torch.tensor([image_size]), image_newline=end, **more)[0][0]
                return packed

            known[key] = tiled(pack, views, side, crops, device)  # type: ignore[arg-type]
        origin, exact = known[key]
        if origin.n != features[i].shape[0]:
            raise RuntimeError(f"image {i} has {features[i].shape[0]} features, but its tiles give {origin.n}")
        rows = torch.where(origin.view < 0, -1, origin.index[:, 0] + row) if exact else None
        out.append(Entry(origin, first, rows))
        first += origin.views
        row += origin.views * n
    return out


def _unpatched(numbers: Any, images: int) -> list[bool]:
    """Images that LLaVA-OneVision does not tile: those of prompts with several."""
    if numbers is None:
        return [False] * images
    return [n != 1 for n in torch.as_tensor(numbers).tolist() for _ in range(n)]


def _videos(
    inner: Any, seen: Encoded, side: int, features: Any, given: dict[str, Any], device: Any
) -> list[Entry]:
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))  # as early releases call it
    videos, frames = pixels.shape[:2]
    n = side * side
    rows: Tensor | None = None
    if hasattr(inner, "vision_resampler"):  # LLaVA-NeXT-Video pools before its projector
        stride = inner.config.spatial_pool_stride
        pool = nn.AvgPool2d(stride, stride)
        one = pooled(lambda t: pool(t.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2), n, device)
        video = one.repeat(frames)
        rows = torch.arange(video.n, device=device)
    elif hasattr(inner, "apply_pooling"):  # LLaVA-OneVision, behind it
        video = with_end(pooled(inner.apply_pooling, n, device).repeat(frames))
    else:
        per_frame = features[0].shape[0]
        one = grid(side, side, device)
        video = (with_class(one) if per_frame == n + 1 else one).repeat(frames)
        rows = torch.arange(video.n, device=device)
    return [
        Entry(video, v * frames, None if rows is None else rows + v * video.n) for v in range(videos)
    ]
