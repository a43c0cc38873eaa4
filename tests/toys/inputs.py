"""Pixels for every family, and a left-padded batch of two prompts: one image, and two images of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from toys.build import CLOSE, IMAGE, OPEN, inner_of

#: Text tokens and images of every prompt.
ROWS = ((9, 1), (5, 2))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _vision(model: Any) -> Any:
    names = ("vision_config", "vision_model_config", "vq_config")
    return next((c for n in names if (c := getattr(model.config, n, None)) is not None), model.config)


def _one(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _sides(n: int) -> list[list[int]]:
    """Rows and columns of patches of ``n`` images, every other one half as wide."""
    return [[8, 8 if i % 2 == 0 else 4] for i in range(n)]


def _grid(n: int) -> torch.Tensor:
    return torch.tensor([[1, *side] for side in _sides(n)])


def _square(side: int) -> Callable[[Any, int], dict[str, Any]]:
    return lambda model, n: {"pixel_values": noise(n, 3, side, side)}


def _by_row(model: Any, n: int) -> dict[str, Any]:
    """Images of a row along an axis of its own, empty ones behind (rows of one and of two images where n is 3)."""
    if n != 3:
        return {"pixel_values": noise(1, n, 3, 32, 32)}
    pixels, images = torch.zeros(2, 2, 3, 32, 32), noise(3, 3, 32, 32)
    pixels[0, 0], pixels[1, 0], pixels[1, 1] = images
    return {"pixel_values": pixels}


def _docling(model: Any, n: int) -> dict[str, Any]:
    there = torch.tensor([[True, False], [True, True]]) if n == 3 else torch.ones(1, n, dtype=torch.bool)
    return {**_by_row(model, n), "pixel_attention_mask": there}


def _patches(model: Any, n: int) -> dict[str, Any]:
    size, grid = _one(_vision(model).patch_size), _grid(n)
    return {"pixel_values": noise(int(grid.prod(1).sum()), 3, size, size), "image_grid_thw": grid}


def _strip(model: Any, n: int) -> dict[str, Any]:
    size, sides = _one(_vision(model).patch_size), torch.tensor(_sides(n))
    return {"pixel_values": noise(1, 3, size, size * int(sides.prod(1).sum())), "target_sizes": sides}


def _flat(width: int | None) -> Callable[[Any, int], dict[str, Any]]:
    def make(model: Any, n: int) -> dict[str, Any]:
        grid, wide = _grid(n), width
        if wide is None:
            proj = getattr(getattr(model.model.vision_tower, "patch_embed", None), "proj", None)
            wide = 96 if proj is None else proj.in_features
        return {"pixel_values": noise(int(grid.prod(1).sum()), wide), "image_grid_thw": grid}

    return make


def _merging(model: Any, n: int) -> dict[str, Any]:
    size, grid = _one(_vision(model).patch_size), _grid(n)
    pixels = noise(int(grid.prod(1).sum()), 3 * size * size)
    return {"pixel_values": pixels, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2] * n)}


def _pooled(model: Any, n: int) -> dict[str, Any]:
    """Molmo 2: one crop of 8x8 patches per image, 2x2 of which become a token."""
    pool = [
        [i * 64 + (2 * r + a) * 8 + 2 * c + b for a in range(2) for b in range(2)]
        for i in range(n) for r in range(4) for c in range(4)
    ]  # fmt: skip
    return {
        "pixel_values": noise(n, 64, 48), "image_token_pooling": torch.tensor(pool),
        "image_grids": torch.tensor([[4, 4, 0, 0]] * n), "image_num_crops": torch.ones(n, dtype=torch.long),
    }  # fmt: skip


def _placed(width: int) -> Callable[[Any, int], dict[str, Any]]:
    def make(model: Any, n: int) -> dict[str, Any]:
        at = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).flip(-1)
        return {"pixel_values": noise(n, 64, width), "image_position_ids": at.reshape(1, 64, 2).repeat(n, 1, 1)}

    return make


PIXELS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    **dict.fromkeys(("llava", "llama4", "aria"), _square(32)),
    **dict.fromkeys(("gemma3n", "fast_vlm"), _square(128)),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert"), _by_row),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _patches),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _strip),
    "granite_docling": _docling,
    "video_llama_3": _merging,
    "muse_glimmer": _flat(None),
    "deepseek_vl_hybrid": lambda m, n: {
        "pixel_values": noise(n, 3, 32, 32),
        "high_res_pixel_values": noise(n, 3, 64, 64),
    },
    "molmo2": _pooled,
    "perception_lm": lambda m, n: {"pixel_values": noise(n, 1, 3, 32, 32)},
    "gemma4_unified": _placed(432),
    "neomme": lambda m, n: {"pixel_values": noise(n * 16, 48)},
}


def feature_names(inner: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(type(inner).get_image_features)).parameters)[1:]


def pixels(name: str, model: Any, n: int) -> dict[str, Any]:
    """Inputs for ``n`` images in all."""
    if name in PIXELS:
        return PIXELS[name](model, n)
    names, vision = feature_names(inner_of(model)), _vision(model)
    patch, side = _one(getattr(vision, "patch_size", 4)), _one(getattr(vision, "image_size", 32) or 32)
    if "image_grid_thw" in names:
        channels = next((c for k in ("in_channels", "in_chans") if (c := getattr(vision, k, None))), None)
        channels = channels or getattr(vision, "num_channels", 3)
        grid, frames = _grid(n), getattr(vision, "temporal_patch_size", 1) or 1
        return {"pixel_values": noise(int(grid.prod(1).sum()), channels * frames * patch**2), "image_grid_thw": grid}
    if "spatial_shapes" in names:
        sides = torch.tensor(_sides(n))
        there = (torch.arange(64) < sides.prod(1, keepdim=True)).long()
        return {"pixel_values": noise(n, 64, 3 * patch**2), "spatial_shapes": sides, "pixel_attention_mask": there}
    if "image_position_ids" in names:
        return _placed(3 * patch**2)(model, n)
    if "image_sizes" in names and "image_grid_pinpoints" in vars(model.config):
        return {"pixel_values": noise(n, 3, 3, side, side), "image_sizes": torch.tensor([[side, 2 * side]] * n)}
    if "image_sizes" in names:
        return {"pixel_values": noise(n, 3, 32, 32), "image_sizes": 4 * torch.tensor(_sides(n))}
    return {"pixel_values": noise(n, 3, side, side)}


def features(model: Any, inputs: dict[str, Any]) -> Any:
    """What the model makes of the pixels among ``inputs``."""
    inner = inner_of(model)
    given = {k: inputs[k] for k in feature_names(inner) if k in inputs}
    with torch.no_grad():
        return inner.get_image_features(**given, return_dict=True)


def _lengths(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [v.numel() // v.shape[-1] for v in value]
    return [v.numel() // v.shape[-1] for v in value] if value.dim() > 2 else [len(value)]


def prompt(name: str, model: Any, rows: tuple[tuple[int, int], ...] = ROWS) -> dict[str, Any]:
    """A left-padded batch of prompts of ``rows`` (text tokens, images)."""
    count = sum(images for _, images in rows)
    inputs = pixels(name, model, count)
    made = features(model, inputs)
    value = made.pooler_output if made.get("pooler_output") is not None else made.last_hidden_state
    lengths = _lengths(value)
    lengths = lengths if len(lengths) == count else [sum(lengths) // count] * count
    begin = 80 if name == "neomme" else OPEN  # an image behind a document token is none there
    g, left, parts = torch.Generator().manual_seed(1), iter(lengths), []
    for text, images in rows:
        words = torch.randint(10, 80, (text,), generator=g).tolist()
        row = words[:2]
        for i in range(images):
            row += [begin, *[IMAGE] * next(left), CLOSE, *words[2 + i : 3 + i]]
        parts.append(row + words[2 + images :])
    width = max(map(len, parts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in parts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in parts])
    out = {"input_ids": ids, "attention_mask": mask, **inputs}
    takes = {n for m in (model, inner_of(model)) for n in inspect.signature(m.forward).parameters}
    out.update({k: (ids == IMAGE).long() for k in ("mm_token_type_ids", "token_type_ids") if k in takes})
    return out


def row_of(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """The inputs of one row of a batch of :data:`ROWS`: the first image, or the other two, without padding."""
    images = slice(0, 1) if b == 0 else slice(1, 3)
    real = inputs["attention_mask"][b].bool()
    sizes = next((inputs[n] for n in ("image_grid_thw", "target_sizes") if n in inputs), None)
    out = {}
    for name, value in inputs.items():
        if value.shape[:2] == real.expand(2, -1).shape:
            out[name] = value[b : b + 1, real]
        elif name != "pixel_values" or sizes is None:
            out[name] = value[images]
        else:
            ends = [0, *sizes.prod(1).cumsum(0).tolist()]
            mine = slice(ends[images.start], ends[images.stop])
            if len(value) == ends[-1]:
                out[name] = value[mine]
            else:  # a strip of patches side by side
                side = value.shape[2]
                out[name] = value[..., mine.start * side : mine.stop * side]
    return out
