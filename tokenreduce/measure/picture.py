"""Pictures of what became of an image's tokens: each final token's region drawn over the image."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.common.images import as_rgb
from tokenreduce.common.words import counted
from tokenreduce.core.labels import label_of
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.core.trace import Step

__all__ = [
    "Look", "draw", "draw_regions", "look", "looked", "only_tower", "overlay", "patch_size", "shaded", "show", "view",
]  # fmt: skip

MARGIN, INK, PAPER = 12, (28, 28, 28), (255, 255, 255)


def draw(
    image: Image.Image,
    plan: Plan | None,
    grid: tuple[int, int],
    prefix: int = 0,
    *,
    sample: int = 0,
    title: str = "",
    side: int = 448,
) -> Image.Image:
    """``image`` on the left, its final tokens on the right, and a line that counts them above.

    A patch that is alone in its token keeps its pixels. Patches that were merged show their common mean colour, and a
    line of the region's own colour runs around them, so that parts that do not touch can be told to belong together.
    Dropped patches are dimmed and hatched; so are those that went into a prefix token.

    Args:
        image: the pixels that the model saw; any size, the grid is stretched over it.
        plan: from the tokens at the model's entry (prefix included) to the final ones; None if nothing acted.
        grid: rows and columns of patches at the entry.
        prefix: protected leading tokens (class token, registers), which have no place in the image.
        sample: row of the batch.
        title: what acted, for the line above.
        side: least width or height of each half in pixels; smaller images are enlarged.

    Raises ``ValueError`` when grid and prefix do not make up the plan's tokens.
    """
    rows, cols = grid
    if plan is not None and plan.n != prefix + rows * cols:
        raise ValueError(
            f"the plan has {plan.n} tokens, but prefix {prefix} and grid {rows}x{cols} make {prefix + rows * cols}"
        )
    return draw_regions(image, _regions(plan, grid, prefix, sample), prefix, title=title, side=side)


def draw_regions(
    image: Image.Image, region: np.ndarray, prefix: int = 0, *, title: str = "", side: int = 448
) -> Image.Image:
    """:func:`draw` where ``region`` (rows, cols) says the token that each patch went into, -1 where it is gone."""
    rows, cols = region.shape
    before = np.asarray(_enlarged(as_rgb(image), (rows, cols), side))
    return _beside(before, _painted(before, region), _caption(region, prefix, title))


def overlay(image: Image.Image, region: np.ndarray, *, side: int = 448) -> Image.Image:
    """The right half of :func:`draw_regions`: ``image`` with what became of its tokens drawn over it."""
    rows, cols = region.shape
    return Image.fromarray(_painted(np.asarray(_enlarged(as_rgb(image), (rows, cols), side)), region))


def shaded(image: Image.Image, share: np.ndarray, *, side: int = 448) -> Image.Image:
    """``image`` where ``share`` (rows, columns) says how much of each patch is left: from 1, as it is, down to 0, where
    the paper is seen."""
    pixels = np.asarray(_enlarged(as_rgb(image), (1, 1), side)).astype(np.float64)
    left = _patch_of(pixels, share)[..., None]
    out = pixels * left + np.array(PAPER) * (1 - left)
    return Image.fromarray(out.round().astype(np.uint8))


def _patch_of(pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """What ``grid`` (rows, columns) says of the patch of every pixel, also for sizes that it does not divide."""
    (height, width, _), (rows, cols) = pixels.shape, grid.shape
    up, across = np.arange(height) * rows // height, np.arange(width) * cols // width
    return grid[up[:, None], across[None, :]]


def _regions(plan: Plan | None, grid: tuple[int, int], prefix: int, sample: int) -> np.ndarray:
    """(rows, cols) int: the output of each patch, -1 where it is gone."""
    rows, cols = grid
    if plan is None:
        return np.arange(prefix, prefix + rows * cols).reshape(rows, cols)
    source = plan.sources()[sample].cpu().numpy()[prefix:].copy()
    source[source < prefix] = -1
    return source.reshape(rows, cols)


def _enlarged(image: Image.Image, grid: tuple[int, int], side: int) -> Image.Image:
    w, h = image.size
    # Whole factors keep the pixels of small images square; a patch needs some pixels to show line and filling.
    factor = max(1, -(-side // min(w, h)), -(-12 * grid[0] // h), -(-12 * grid[1] // w))
    how = Image.Resampling.NEAREST if min(w, h) <= 96 else Image.Resampling.BICUBIC
    return image.resize((w * factor, h * factor), how) if factor > 1 else image


def _colour(index: int) -> np.ndarray:
    """A bright colour; neighbours in number are far apart in hue."""
    hue = (index * 0.618034) % 1
    return np.array(colorsys.hsv_to_rgb(hue, 0.55 + 0.35 * (index % 2), 1.0)) * 255


def _painted(pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    rows, cols = region.shape
    where = _patch_of(pixels, region)
    out = pixels.astype(np.float64)
    members = {int(v): int(c) for v, c in zip(*np.unique(region, return_counts=True), strict=True)}
    gone = where < 0
    if gone.any():
        out[gone] = 0.25 * out[gone] + 0.75 * 34
        stripe = (np.arange(height)[:, None] + np.arange(width)[None, :]) // 2 % 5 == 0
        out[gone & stripe] = 84
    line = min(4, max(1, round(min(height / rows, width / cols) / 11)))
    edge = _edges(where, line)
    out[edge & ~gone] = 0.5 * out[edge & ~gone] + 0.5 * 255
    # Colours in the order of size: the large regions, which touch most others, then differ most.
    merged = sorted((r for r, count in members.items() if r >= 0 and count > 1), key=lambda r: (-members[r], r))
    for i, output in enumerate(merged):
        mine = where == output
        out[mine] = pixels[mine].mean(0)
        out[mine & edge] = _colour(i)
    return out.round().astype(np.uint8)


def _edges(where: np.ndarray, width: int) -> np.ndarray:
    """Pixels less than ``width`` away from one of another region; the image's border counts as another."""
    out = np.zeros(where.shape, dtype=bool)
    padded = np.pad(where, width, constant_values=-2)
    h, w = where.shape
    for shift in range(1, width + 1):
        for dy, dx in itertools.product((-shift, 0, shift), repeat=2):
            out |= padded[width + dy : width + dy + h, width + dx : width + dx + w] != where
    return out


def _caption(region: np.ndarray, prefix: int, title: str) -> str:
    values, counts = np.unique(region[region >= 0], return_counts=True)
    dropped = int((region < 0).sum())
    merged = int((counts > 1).sum())
    parts = [f"{prefix + region.size} -> {counted(prefix + len(values), 'token')}"]
    if prefix:
        parts.append(f"{prefix} of them prefix")
    if merged:
        parts.append(f"{int(counts[counts > 1].sum())} patches merged into {merged}")
    if dropped:
        parts.append(f"{dropped} dropped")
    if not merged and not dropped:
        parts.append("nothing merged or dropped")
    return (f"{title}:  " if title else "") + ", ".join(parts)


def _beside(before: np.ndarray, after: np.ndarray, caption: str) -> Image.Image:
    height, width, _ = before.shape
    font = ImageFont.load_default(size=15)
    room = 2 * width + MARGIN
    lines = _wrapped(caption, font, room)
    top = 2 * MARGIN + 21 * len(lines)
    canvas = Image.new("RGB", (room + 2 * MARGIN, height + top + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 21 * i), line, fill=INK, font=font)
    canvas.paste(Image.fromarray(before), (MARGIN, top))
    canvas.paste(Image.fromarray(after), (2 * MARGIN + width, top))
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def view(transform: Callable[[Image.Image], torch.Tensor], image: Image.Image) -> Image.Image:
    """What a model sees of ``image``: its transform's resizing and cropping, without the normalisation.

    The normalisation is found by putting a black and a white image through the transform, so any chain of resizing,
    cropping and a per-channel mean and deviation is undone. Where that fails (transforms that look at the content)
    the tensor is stretched between its least and largest value.
    """
    seen = transform(image).float()
    try:
        black, white = (transform(Image.new("RGB", image.size, c)).float() for c in ("black", "white"))
        low, span = black.amin((1, 2), keepdim=True), (white - black).amax((1, 2), keepdim=True)
        affine = black.shape == seen.shape and bool(((black.amax((1, 2), keepdim=True) - low) < 1e-3).all())
    except Exception:
        affine = False
    if not affine or not bool((span.abs() > 1e-6).all()):
        low, span = seen.min(), (seen.max() - seen.min()).clamp(min=1e-6)
    array = ((seen - low) / span).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


@dataclass(frozen=True)
class Look:
    """What became of one image's tokens, layer by layer; :func:`look` makes it.

    Attributes:
        image: the pixels that the model saw.
        grid, prefix: rows and columns of patches at the entry, and the tokens in front that have no place in them.
        depth: layers of the encoder.
        steps: the encoder's steps of the trace.
        title: what acted.
    """

    image: Image.Image = field(repr=False)
    grid: tuple[int, int]
    prefix: int
    depth: int
    steps: tuple[Step, ...] = field(repr=False)
    title: str

    def plan(self, layer: int | None = None) -> Plan | None:
        """From the entry to the tokens behind 0-based ``layer`` (the last one by default), None if nothing acted.

        Raises ``ValueError`` for a layer that the model does not have.
        """
        _check_layer(layer, self.depth)
        plan: Plan | None = None
        for step in self.steps:
            if step.plan is not None and (layer is None or step.layer <= layer):
                plan = step.plan if plan is None else plan.then(step.plan)
        return plan

    def draw(self, layer: int | None = None, *, side: int = 448) -> Image.Image:
        """The image, and beside it what is left behind ``layer``; see :func:`draw`."""
        title = self.title + ("" if layer is None else f", after layer {layer}")
        return draw(self.image, self.plan(layer), self.grid, self.prefix, title=title, side=side)

    def overlay(self, layer: int | None = None, *, side: int = 448) -> Image.Image:
        """Only the right half of :meth:`draw`, without its line of text."""
        return overlay(self.image, _regions(self.plan(layer), self.grid, self.prefix, 0), side=side)

    def caption(self, layer: int | None = None) -> str:
        """How many tokens were merged and dropped up to ``layer``."""
        return _caption(_regions(self.plan(layer), self.grid, self.prefix, 0), self.prefix, "")


def look(loaded: Any, image: Image.Image, reducers: Reducer | str | Sequence[Reducer | str]) -> Look:
    """Run one image through a model with ``reducers`` and keep what became of its tokens in every layer.

    Args:
        loaded: what ``tokenreduce.bench.models.load_model`` returns: ``model``, ``transform`` and ``forward``.
        image: any PIL image; the pictures show the part of it that the transform leaves.
        reducers: reducers or their text.

    Raises ``ValueError`` for a model without a token grid, or one with several vision towers, and whatever
    :func:`tokenreduce.patch` raises.
    """
    from tokenreduce.core.trace import record
    from tokenreduce.patching import patched

    chosen = parse(*((reducers,) if isinstance(reducers, Reducer | str) else reducers))
    only_tower(loaded.model)
    x = loaded.transform(image)
    device = next(loaded.model.parameters()).device
    with torch.no_grad(), patched(loaded.model, *chosen), record(loaded.model, flops=False) as trace:
        loaded.forward(loaded.model, x.unsqueeze(0).to(device))
    return looked(loaded, image, chosen, trace.steps)


def _check_layer(layer: int | None, depth: int) -> None:
    if layer is not None and not 0 <= layer < depth:
        raise ValueError(f"layer is 0 to {depth - 1} for a model with {depth} layers, not {layer}")


def only_tower(model: Any) -> Any:
    """The vision tower of ``model``. Raises ``ValueError`` where there are several."""
    from tokenreduce.patching import describe

    towers = describe(model).towers
    if len(towers) != 1:
        raise ValueError(
            f"the model has {len(towers)} vision towers ({', '.join(t.name for t in towers)}); load one of them"
        )
    return towers[0]


def looked(loaded: Any, image: Image.Image, chosen: Sequence[Reducer], steps: Sequence[Step]) -> Look:
    """A :class:`Look` at the ``steps`` that ``chosen`` took on ``image``. Raises ``ValueError`` as :func:`look`."""
    tower = only_tower(loaded.model)
    # That of this forward: a model that takes images of any size has no other, and its own may have as many patches.
    grid = steps[0].grid if steps else tower.grid
    if grid is None or len(grid) != 2:
        raise ValueError(f"{tower.family} says no grid of patches for this image; load it with a fixed image size")
    seen = view(loaded.transform, image)
    title = label_of(chosen)
    for reducer in chosen:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:  # the picture shows the smaller image
            high, wide = patch_size(tower.module)
            rows, cols = seen.height // high, seen.width // wide
            size = max(1, seen.width * grid[1] // cols), max(1, seen.height * grid[0] // rows)
            title += f", image of {seen.width}x{seen.height} resized to {size[0]}x{size[1]}"
            seen = seen.resize(size, Image.Resampling.BILINEAR)
    return Look(seen, (grid[0], grid[1]), tower.prefix, len(tower.blocks), tuple(steps), title)


def patch_size(module: Any) -> tuple[int, int]:
    """Rows and columns of pixels of a patch of a vision tower."""
    owner = getattr(module, "patch_embed", getattr(module, "config", module))
    side = owner.patch_size
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def show(
    loaded: Any,
    image: Image.Image,
    reducers: Reducer | str | Sequence[Reducer | str],
    *,
    layer: int | None = None,
    side: int = 448,
) -> Image.Image:
    """Run one image through a model with ``reducers`` and draw what became of its tokens; see :func:`draw`.

    ``layer`` (0-based) says after which layer to look, the last one by default. Raises ``ValueError`` for a layer that
    the model does not have, and what :func:`look` raises.
    """
    check_layer(loaded, layer)
    return look(loaded, image, reducers).draw(layer, side=side)


def check_layer(loaded: Any, layer: int | None) -> None:
    """Raise ``ValueError`` for a 0-based ``layer`` that the model does not have, before anything is computed."""
    _check_layer(layer, len(only_tower(loaded.model).blocks))
