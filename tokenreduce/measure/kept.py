"""Pictures of the visual tokens that a reduction left, before and inside the language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tokenreduce.measure.generation import Comparison, follow, visual_columns
from tokenreduce.measure.picture import PAPER, draw_regions, overlay, view
from tokenreduce.measure.question import Question
from tokenreduce.patching import patched

__all__ = ["Place", "draw_kept", "frame_places", "kept_views", "places", "sheet"]


@dataclass(frozen=True)
class Place:
    """One image of a prompt: the ``columns`` (rows*cols,) of its tokens, row-major, and ``seen``, the part of the image
    that they cover."""

    columns: Tensor
    grid: tuple[int, int]
    seen: Image.Image = field(repr=False)


def places(model: nn.Module, processor: Any, question: Question) -> list[Place]:
    """Where the visual tokens of every image lie: on one full grid, or, where images are cut into crops, on that of an
    overview and on that of all crops together, one after the other.

    Raises ``ValueError`` where neither can be told.
    """
    columns = visual_columns(model, question).nonzero().flatten()
    if hasattr(_inner(model), "pack_image_features"):
        return _tiles(model, question, columns)
    found = _merged_grids(model, question) or _square_grids(question, len(columns))
    counts = [prefix + rows * cols for prefix, rows, cols in found]
    if not found or sum(counts) != len(columns):
        sizes = ", ".join(f"{image.width}x{image.height}" for image in question.images)
        shape = tuple(question.inputs["pixel_values"].shape) if "pixel_values" in question.inputs else "none"
        raise ValueError(
            f"cannot tell where the {len(columns)} visual tokens of {type(model).__name__} lie in the images ({sizes}; "
            f"pixel_values {shape}). Pictures need one grid of tokens per image: LLaVA-1.5, Qwen-VL, PaliGemma, "
            f"Gemma3, InternVL without crop_to_patches, Idefics3 and SmolVLM without do_image_splitting"
        )
    out = []
    for image, (prefix, rows, cols), mine in zip(question.images, found, columns.split(counts), strict=True):
        out.append(Place(mine[prefix:], (rows, cols), _seen(processor, question, image, (rows, cols))))
    return out


def _inner(model: Any) -> Any:
    return getattr(model, "model", model)


def _tiles(model: Any, question: Question, columns: Tensor) -> list[Place]:
    """Overview and crops of every image, from the model's own packing of its features."""
    from tokenreduce.adapters.language.projector.seen import encoded_in
    from tokenreduce.adapters.language.towers import Everything

    names = ("pixel_values", "image_sizes", "batch_num_images")
    given = {k: v for k, v in question.inputs.items() if k in names}
    with torch.no_grad(), patched(model, Everything()):
        seen = encoded_in(_inner(model).get_image_features(**given, return_dict=True))
    assert seen is not None
    out = []
    for image, entry, mine in zip(
        question.images, seen.entries, columns.split([e.origin.n for e in seen.entries]), strict=True
    ):
        origin = entry.origin
        for part in (origin.view == 0, origin.view > 0):
            if not bool(part.any()):
                continue
            place = origin.place[part].cpu()
            rows, cols = place[:, 0].unique(), place[:, 1].unique()  # what is padding is cut off on both sides
            out.append(Place(mine[part.cpu()], (len(rows), len(cols)), image))
    return out


def draw_kept(comparison: Comparison, where: Sequence[Place], *, side: int = 448) -> Image.Image:
    """For every image and every place where a method acted: the image, and beside it what is left of its tokens.

    Patches that the vision encoder merged show as dropped, all but the one that stands for them.

    Raises ``ValueError`` where no method acted before or inside the language model.
    """
    assert comparison.visual is not None
    drawn = []
    behind = follow(comparison.steps, len(comparison.visual))
    if not behind:
        raise ValueError(
            f"{comparison.spec} does nothing before or inside the language model; there is nothing to draw"
        )
    for number, place in enumerate(where, 1):
        for (_, left), site in zip(behind, comparison.sites, strict=True):
            title = f"{site.method} {site}"
            if len(where) > 1:
                title = f"image {number} of {len(where)}, {title}"
            region = left[place.columns].view(place.grid).numpy()
            drawn.append(draw_regions(place.seen, region, title=title, side=side))
    return _stacked(drawn)


def kept_views(comparison: Comparison, where: Sequence[Place], *, side: int = 224) -> list[tuple[Image.Image, str]]:
    """Every image with what is left of its tokens behind the last place where a method acted, and a line that counts
    them. Where no method acted before or inside the language model, all tokens are left."""
    assert comparison.visual is not None
    behind = follow(comparison.steps, len(comparison.visual))
    left = behind[-1][1] if behind else torch.arange(len(comparison.visual))
    out = []
    for place in where:
        region = left[place.columns].view(place.grid).numpy()
        stay = len(set(region[region >= 0].tolist()))
        out.append((overlay(place.seen, region, side=side), f"{stay} of {region.size} tokens"))
    return out


def sheet(pictures: Sequence[Image.Image], *, side: int = 336, gap: int = 6) -> Image.Image:
    """``pictures`` on one, row by row, each as large as they fit into cells of ``side``; a single one stands alone."""
    if len(pictures) == 1:
        return pictures[0]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), PAPER)
    for i, picture in enumerate(pictures):
        scale = side / max(picture.size)
        small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        canvas.paste(small, (i % columns * (side + gap), i // columns * (side + gap)))
    return canvas


def frame_places(processor: Any, question: Question, grid: tuple[int, int], columns: Tensor) -> list[Place]:
    """:class:`Place` of every image of ``question`` where each has one ``grid`` of tokens, in order, in ``columns``.

    Raises ``ValueError`` where that is not so.
    """
    each = grid[0] * grid[1]
    if len(columns) != each * len(question.images):
        raise ValueError(f"{len(columns)} visual tokens are not {len(question.images)} grids of {grid[0]}x{grid[1]}")
    return [
        Place(mine, grid, _seen(processor, question, image, grid))
        for image, mine in zip(question.images, columns.split(each), strict=True)
    ]


def _merged_grids(model: Any, question: Question) -> list[tuple[int, int, int]]:
    """(0, rows, columns) of every image for models of the Qwen kind, which say the grid of patches; else empty."""
    grids = question.inputs.get("image_grid_thw")
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", None)
    if not isinstance(grids, Tensor) or merge is None:
        return []
    return [(0, int(h) // merge, int(w) // merge) for _, h, w in grids.tolist()]


def _square_grids(question: Question, tokens: int) -> list[tuple[int, int, int]]:
    """(tokens in front, rows, columns) of every image where each is one view with as many tokens; else empty."""
    pixels, images = question.inputs.get("pixel_values"), len(question.images)
    if not isinstance(pixels, Tensor) or pixels.dim() < 4 or tokens % images:
        return []
    if math.prod(pixels.shape[:-3]) != images:
        return []
    each, (high, wide) = tokens // images, pixels.shape[-2:]
    for prefix in (0, 1):  # LLaVA with the "full" features keeps the class token
        rows = round(math.sqrt((each - prefix) * high / wide))
        cols = (each - prefix) // max(rows, 1)
        if rows * cols == each - prefix and rows * wide == cols * high:
            return [(prefix, rows, cols)] * images
    return []


def _seen(processor: Any, question: Question, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    if isinstance(question.inputs.get("image_grid_thw"), Tensor):
        # The whole image, stretched to a multiple of the patches; their pixels come in another order.
        size = getattr(processor.image_processor, "patch_size", 14) * getattr(
            processor.image_processor, "merge_size", 2
        )
        return image.resize((grid[1] * size, grid[0] * size), Image.Resampling.BICUBIC)

    def transform(one: Image.Image) -> Tensor:
        made = processor.image_processor(images=one, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(made).flatten(0, -4)[0]

    return view(transform, image)


def _stacked(pictures: list[Image.Image]) -> Image.Image:
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    canvas = Image.new("RGB", (width, height), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
