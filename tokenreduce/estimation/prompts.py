"""Inputs of image language models, family by family, without a processor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.families import FAMILIES
from tokenreduce.estimation.subject import Ask

__all__ = ["FILMS", "prompt_of"]

#: What Qwen's image processors are released with, and the largest side in patches of Idefics3's longest edge.
PIXELS = 12_845_056
TILES = 12


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def _plain(config: Any, image: tuple[int, int] | None) -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, 3, _side(config), _side(config))}


def _anyres(config: Any, image: tuple[int, int] | None) -> dict[str, Tensor]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = _side(config)
    width, height = image or (2 * side, 2 * side)
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
    crops = 1 + int(rows) * int(columns)
    return {"pixel_values": _noise(1, crops, 3, side, side), "image_sizes": torch.tensor([[height, width]])}


def _tiles(config: Any, image: tuple[int, int] | None) -> dict[str, Tensor]:
    """InternVL: the grid of at most 12 tiles whose shape is nearest, and a thumbnail where there are several."""
    side = _side(config)
    width, height = image or (side, side)
    grids = [(r, c) for r in range(1, TILES + 1) for c in range(1, TILES + 1) if r * c <= TILES]
    area = width * height
    best = min(grids, key=lambda g: (abs(width / height - g[1] / g[0]), abs(area - g[0] * g[1] * side * side)))
    many = best[0] * best[1]
    return {"pixel_values": _noise(many + (many > 1), 3, side, side)}


def _edges(config: Any, image: tuple[int, int] | None) -> dict[str, Tensor]:
    """Idefics3: the longest edge becomes four tiles, and there is an overview."""
    side = _side(config)
    width, height = image or (4 * side, 4 * side)
    scale = 4 * side / max(width, height)
    many = math.ceil(width * scale / side) * math.ceil(height * scale / side) + 1
    return {"pixel_values": _noise(1, many, 3, side, side)}


def _grid(config: Any, image: tuple[int, int] | None) -> tuple[int, int]:
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    width, height = image or (1344, 1008)
    shrink = min(1.0, math.sqrt(PIXELS / (width * height)))
    rows, columns = (max(1, round(n * shrink / unit)) * vision.spatial_merge_size for n in (height, width))
    return rows, columns


def _numbers(config: Any) -> int:
    vision = config.vision_config
    return int(getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2)


def _packed(config: Any, image: tuple[int, int] | None) -> dict[str, Tensor]:
    rows, columns = _grid(config, image)
    grid = torch.tensor([[1, rows, columns]])
    return {"pixel_values": _noise(rows * columns, _numbers(config)), "image_grid_thw": grid}


def _packed_film(config: Any, image: tuple[int, int] | None, frames: int) -> dict[str, Tensor]:
    rows, columns = _grid(config, image or (448, 448))
    times = math.ceil(frames / config.vision_config.temporal_patch_size)
    grid = torch.tensor([[times, rows, columns]])
    return {"pixel_values_videos": _noise(times * rows * columns, _numbers(config)), "video_grid_thw": grid}


def _frames(config: Any, image: tuple[int, int] | None, frames: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": _noise(1, frames, 3, _side(config), _side(config))}


Images = Callable[[Any, "tuple[int, int] | None"], "dict[str, Tensor]"]
Films = Callable[[Any, "tuple[int, int] | None", int], "dict[str, Tensor]"]
IMAGES: dict[str, Images] = {
    "LlavaModel": _plain, "PaliGemmaModel": _plain, "Gemma3Model": _plain, "LlavaNextModel": _anyres,
    "LlavaNextVideoModel": _anyres, "LlavaOnevisionModel": _anyres, "InternVLModel": _tiles, "Idefics3Model": _edges,
    "SmolVLMModel": _edges, "Qwen2VLModel": _packed, "Qwen2_5_VLModel": _packed, "Qwen3VLModel": _packed,
}  # fmt: skip
FILMS: dict[str, Films] = {
    "LlavaNextVideoModel": _frames, "LlavaOnevisionModel": _frames, "Qwen2VLModel": _packed_film,
    "Qwen2_5_VLModel": _packed_film, "Qwen3VLModel": _packed_film,
}  # fmt: skip


def prompt_of(model: Any, family: str, ask: Ask, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """One prompt of ``ask.prompt`` text tokens around an image or a clip, with as many placeholders as the narrow
    ``model`` makes features. ``ids`` are those of the placeholders of images and videos.

    Raises ``ValueError`` for a family without an entry here, and for frames where it takes images only.
    """
    if family not in IMAGES:
        raise ValueError(f"no estimate for {family} from its config; families: {', '.join(sorted(IMAGES))}")
    inner = _inner(model, family)
    if ask.frames is None:
        given, token, features = IMAGES[family](inner.config, ask.image), ids[0], inner.get_image_features
    elif family in FILMS:
        given = FILMS[family](inner.config, ask.image, ask.frames)
        token, features = ids[1], inner.get_video_features
    else:
        raise ValueError(f"{family} takes images and no videos; families with --frames: {', '.join(sorted(FILMS))}")
    with torch.no_grad():
        made = features(**given)
    count = _rows(getattr(made, "pooler_output", made))
    text = torch.full((max(ask.prompt, 4),), 10)
    half = len(text) // 2
    runs = int(given["video_grid_thw"][0, 0]) if family == "Qwen3VLModel" and ask.frames else 1  # a run per time stamp
    row = torch.cat([text[:half], *runs * _run(inner.config, token, count // runs), text[half:]])
    words = model.get_input_embeddings().num_embeddings
    if int(row.max()) >= words:
        raise ValueError(
            f"the config's placeholder {int(row.max())} is not among the {words:,} tokens of its vocabulary"
        )
    row = row[None]
    out = {"input_ids": row, "attention_mask": torch.ones_like(row), **given}
    takes = inspect.signature(model.forward).parameters
    types = FAMILIES[family].types
    if family == "PaliGemmaModel":
        out["token_type_ids"] = torch.zeros_like(row)
    elif types in takes:
        out[types] = (row == ids[0]).long() + (2 * (row == ids[-1]).long() if len(ids) > 1 else 0)
    return out


def _run(config: Any, token: int, count: int) -> list[Tensor]:
    """Placeholders between the edges that Qwen puts around them."""
    edges = [getattr(config, f"vision_{edge}_token_id", None) for edge in ("start", "end")]
    before, behind = ([] if edge is None else [torch.tensor([edge])] for edge in edges)
    return [*before, torch.full((count,), token), *behind]


def _inner(model: Any, family: str) -> Any:
    return next(m for m in model.modules() if type(m).__name__ == family)


def _rows(made: Any) -> int:
    if isinstance(made, Tensor):
        return made.numel() // made.shape[-1]
    return sum(map(_rows, made))
