"""The images of one call of a vision tower: where the tokens of each come from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenreduce.adapters.language.projector.origin import blocks_of_patches, grid, pooled, tiled, with_class, with_end
from tokenreduce.adapters.language.projector.seen import Encoded, Entry
from tokenreduce.core.evidence import Origin

__all__ = ["entries", "of_tiles"]


def entries(inner: Any, kind: str, seen: Encoded, features: Any, given: dict[str, Any]) -> list[Entry]:
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
        r = (
            round(1 / inner.config.downsample_ratio)
            if hasattr(inner.config, "downsample_ratio")
            else (inner.config.scale_factor)
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
    alone = _unpatched(given.get("batch_num_images"), len(sizes))
    out, first, row, known = [], 0, 0, {}
    n = side * side
    for i, image_size in enumerate(sizes):
        key = (tuple(image_size), alone[i])
        if key not in known:
            known[key] = of_tiles(inner, image_size, side, alone[i], given.get("vision_aspect_ratio"), device)
        origin, exact = known[key]
        if origin.n != features[i].shape[0]:
            raise RuntimeError(f"image {i} has {features[i].shape[0]} features, but its tiles give {origin.n}")
        rows = torch.where(origin.view < 0, -1, origin.index[:, 0] + row) if exact else None
        out.append(Entry(origin, first, rows))
        first += origin.views
        row += origin.views * n
    return out


def of_tiles(
    inner: Any, image_size: Sequence[int], side: int, alone: bool = False, aspect: str | None = None, device: Any = None
) -> tuple[Origin, bool]:
    """Where the tokens of an image of ``image_size`` (rows, columns) pixels come from, by the packing of ``inner``,
    which has ``side`` x ``side`` patches in a view; ``alone`` is the overview without crops. Also returns whether
    tokens are patches, and not interpolated from several."""
    config = inner.config
    parameters = inspect.signature(inner.pack_image_features).parameters
    size = config.vision_config.image_size
    crops = (1, 1)
    if not alone:
        rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size)
        crops = int(rows), int(columns)
    more: dict[str, Any] = {}
    if "vision_feature_select_strategy" in parameters:
        more["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    if "vision_aspect_ratio" in parameters:
        more["vision_aspect_ratio"] = config.vision_aspect_ratio if aspect is None else aspect

    def pack(t: Tensor) -> Tensor:
        end = torch.zeros(t.shape[-1], device=t.device)
        sizes = torch.tensor([image_size])
        packed: Tensor = inner.pack_image_features([t], sizes, image_newline=end, **more)[0][0]
        return packed

    return tiled(pack, 1 if alone else crops[0] * crops[1] + 1, side, crops, device)


def _unpatched(numbers: Any, images: int) -> list[bool]:
    """Images that LLaVA-OneVision does not tile: those of prompts with several."""
    if numbers is None:
        return [False] * images
    return [n != 1 for n in torch.as_tensor(numbers).tolist() for _ in range(n)]


def _videos(inner: Any, seen: Encoded, side: int, features: Any, given: dict[str, Any], device: Any) -> list[Entry]:
    pixels: Any = given.get("pixel_values_videos", given.get("pixel_values"))  # as early releases call it
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
    return [Entry(video, v * frames, None if rows is None else rows + v * video.n) for v in range(videos)]
