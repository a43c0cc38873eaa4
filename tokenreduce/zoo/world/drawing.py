"""How things, backgrounds and noise become pixels, and coverage becomes one label per patch.

Everything after the shape masks is integer arithmetic on raw PCG64 output, so a seed gives the same bytes on every
platform; only the rims of digits depend on the FreeType version behind Pillow's built-in font.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.zoo.world.vocabulary import COLOURS, KINDS, PATCH, TEXTURES

__all__ = [
    "ANGLES", "BOX", "SIZES", "Draw", "background", "compose", "labels", "mask", "reach", "share", "texture_pattern",
    "tint",
]  # fmt: skip

#: Sizes in pixels, rotations in degrees, and the side of the box that holds every mask.
SIZES, ANGLES, BOX = (14, 16, 18), (0, -8, 8), 20
_FINE = 4  # masks are drawn this much larger and averaged

_RGB = np.array(
    [(225, 35, 35), (50, 190, 60), (60, 95, 240), (235, 215, 50), (165, 60, 215), (245, 140, 25), (50, 205, 220),
     (240, 240, 240)]
)  # fmt: skip


class Placed(Protocol):
    """What drawing needs to know of a thing."""

    @property
    def kind(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def angle(self) -> int: ...


class Draw:
    """Random numbers of one seed: only ``random()`` and raw bits, which numpy keeps stable between versions."""

    def __init__(self, stream: int, seed: int) -> None:
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed must be a non-negative integer, not {seed!r}")
        # The stream keeps a scene, a clip and the questions of the same seed independent of each other.
        self._bits = np.random.PCG64(np.random.SeedSequence([stream, int(seed)]))
        self.random = np.random.Generator(self._bits).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, options: Sequence[Any]) -> Any:
        """One of ``options``."""
        return options[self.below(len(options))]

    def sample(self, options: Iterable[Any], n: int) -> list[Any]:
        """``n`` different ones of ``options`` in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]

    def noise(self, *shape: int) -> np.ndarray:
        """Bell-shaped int16 noise with standard deviation 5: the sum of four uniform bytes, scaled."""
        count = math.prod(shape)
        words = self._bits.random_raw((count + 1) // 2).astype("<u8", copy=False)
        total = words.view(np.uint8)[: 4 * count].reshape(4, *shape).sum(0, dtype=np.int32)
        return (((total - 510) * 5 + 74) // 148).astype(np.int16)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    fifth, tip, inner = 2 * math.pi / 5, 1.08, 0.5
    angle = np.abs((np.arctan2(v, u) + math.pi / 2 + fifth / 2) % fifth - fifth / 2)
    radius, x, y = np.hypot(u, v), inner * math.cos(fifth / 2), inner * math.sin(fifth / 2)
    # Inside means on the origin's side of the edge from the tip (tip, 0) to the inner corner (x, y).
    return (radius * np.cos(angle) - tip) * y - radius * np.sin(angle) * (x - tip) <= 0


# Shapes in units of half the size, u to the right and v down.
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 0.95,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.87,
    "triangle": lambda u, v: (v <= 0.85) & (abs(u) <= (v + 1) / 1.85),
    "diamond": lambda u, v: abs(u) / 0.82 + abs(v) <= 1.05,
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.95),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.33),
    "heart": lambda u, v: (
        ((1.15 * u) ** 2 + (0.12 - 1.12 * v) ** 2 - 1) ** 3 <= (1.15 * u) ** 2 * (0.12 - 1.12 * v) ** 3
    ),
    # Of the second world only.
    "moon": lambda u, v: (u**2 + v**2 <= 1) & ((u - 0.55) ** 2 + v**2 > 0.6),
    "arrow": lambda u, v: ((v <= 0) & (abs(u) <= v + 1)) | ((v >= 0) & (v <= 0.95) & (abs(u) <= 0.33)),
    "bar": lambda u, v: (abs(u) <= 0.97) & (abs(v) <= 0.36),
    "hourglass": lambda u, v: (abs(v) <= 0.95) & (abs(u) <= abs(v) * 0.85 + 0.08),
}


def _glyph(character: str, size: int, angle: int) -> np.ndarray:
    side = BOX * _FINE
    font = ImageFont.load_default(round(size * _FINE / 0.76))  # a digit with its stroke is about 0.76 em high
    page = Image.new("L", (3 * side, 3 * side))
    ImageDraw.Draw(page).text((side, side), character, fill=255, font=font, stroke_width=2, stroke_fill=255)
    ink = page.crop(page.getbbox())
    tile = Image.new("L", (side, side))
    tile.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(tile.rotate(angle, Image.Resampling.BILINEAR), dtype=np.int64)


@functools.cache
def mask(kind: str, size: int, angle: int) -> np.ndarray:
    """Coverage (20,20) int32 in 0..255 of a thing centred in the box; counter-clockwise ``angle`` in degrees."""
    side = BOX * _FINE
    if kind in _SHAPES:
        v, u = (np.mgrid[:side, :side] + 0.5 - side / 2) / (size * _FINE / 2)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        fine = _SHAPES[kind](cos * u - sin * v, sin * u + cos * v) * 255
    else:
        fine = _glyph(kind, size, angle)
    cells = fine.reshape(BOX, _FINE, BOX, _FINE).sum((1, 3))
    return ((cells + _FINE**2 // 2) // _FINE**2).astype(np.int32)


def reach(size: int) -> int:
    """Largest distance in pixels from the centre along an axis that a mask of ``size`` may cover.

    A bound instead of the mask's own extent: places must not depend on how a FreeType version draws a digit.
    """
    return size // 2 + 1


@functools.cache
def _grid(canvas: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:canvas, :canvas].astype(np.int32)
    return x, y


@functools.cache
def _blend(canvas: int, knots: int) -> np.ndarray:
    """(canvas,knots) int32 smooth interpolation weights that sum to 256."""
    place = (2 * np.arange(canvas) + 1) * (knots - 1) * 128 // canvas  # in 1/256 of the distance between knots
    left, t = place >> 8, place & 255
    smooth = (t * t * (768 - 2 * t)) >> 16
    weights = np.zeros((canvas, knots), np.int32)
    weights[np.arange(canvas), left] = 256 - smooth
    weights[np.arange(canvas), left + 1] += smooth.astype(np.int32)
    return weights


def _wave(phase: np.ndarray, period: int) -> np.ndarray:
    """A triangle wave in -256..256."""
    return np.abs(phase % period * 1024 // period - 512) - 256


def texture_pattern(texture: str, draw: Draw, canvas: int) -> np.ndarray:
    """(canvas,canvas) int32 in -256..256."""
    x, y = _grid(canvas)
    if texture == "plain":
        a, b = draw.between(-8, 8), draw.choice((-8, 8))
        a, b = (a, b) if draw.below(2) else (b, a)
        ramp = a * x + b * y
        low, high = int(ramp.min()), int(ramp.max())
        return (ramp - low) * 512 // (high - low) - 256
    if texture == "stripes":
        a, b = draw.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
        period = draw.between(8, 14) * (1 if a * b == 0 else 3) // (1 if a * b == 0 else 2)
        return np.clip(_wave(a * x + b * y + draw.below(period), period) * 2, -256, 256)
    if texture == "checker":
        cell, shift = draw.between(6, 10), draw.below(20)
        return ((((x + shift) // cell + (y + shift) // cell) & 1) * 2 - 1) * 256
    if texture == "dots":
        period, sx, sy = draw.between(10, 14), draw.below(14), draw.below(14)
        u, v = (x + sx) % period * 2 - period + 1, (y + sy) % period * 2 - period + 1
        return np.where(u * u + v * v <= 42, 256, -128)  # radius about 3.2 px
    knots = draw.between(5, 7)
    values = np.array([draw.between(-256, 256) for _ in range(knots * knots)], dtype=np.int32).reshape(knots, knots)
    weights = _blend(canvas, knots)
    return np.clip((weights @ values @ weights.T >> 16) * 3 // 2, -256, 256)


def background(texture: str, draw: Draw, canvas: int) -> np.ndarray:
    """(canvas,canvas,3) int16: dark (mean 25..75), amplitude 8..18, low saturation, without noise."""
    if texture not in TEXTURES:
        raise ValueError(f"unknown texture {texture!r}; choose from {', '.join(TEXTURES)}")
    mean, amplitude = draw.between(25, 75), draw.between(8, 18)
    base = np.array([mean + draw.between(-8, 8) for _ in range(3)], dtype=np.int16)
    return (texture_pattern(texture, draw, canvas) * amplitude >> 8).astype(np.int16)[..., None] + base


def tint(colour: str, draw: Draw) -> np.ndarray:
    """(3,) int32: the colour at 0.90..1.04 of its brightness with a little noise per channel."""
    factor = draw.between(900, 1040)
    noise = np.array([draw.between(-10, 10) for _ in range(3)])
    return np.clip(_RGB[COLOURS.index(colour)] * factor // 1000 + noise, 0, 255).astype(np.int32)


def compose(base: np.ndarray, things: Sequence[tuple[Placed, int, int, np.ndarray]], draw: Draw) -> np.ndarray:
    """(canvas,canvas,3) uint8: ``base`` with (thing, x, y, tint) painted at (x, y), then luminance noise."""
    out, half = base.copy(), BOX // 2
    for thing, x, y, rgb in things:
        alpha = mask(thing.kind, thing.size, thing.angle)[..., None]
        part = out[y - half : y + half, x - half : x + half]
        part[:] = (part * (255 - alpha) + rgb * alpha + 127) // 255
    out += draw.noise(*base.shape[:2])[..., None]
    return np.clip(out, 0, 255).astype(np.uint8)


@functools.cache
def share(kind: str, size: int, angle: int, dx: int, dy: int) -> np.ndarray:
    """Sum of coverage per patch (4,4) when the box starts (dx, dy) pixels inside a patch."""
    wide = np.zeros((4 * PATCH, 4 * PATCH), np.int32)
    wide[dy : dy + BOX, dx : dx + BOX] = mask(kind, size, angle)
    return wide.reshape(4, PATCH, 4, PATCH).sum((1, 3))


def labels(things: Sequence[tuple[Placed, int, int]], canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Kinds and colours (canvas/8, canvas/8) int8 as indices into ``KINDS`` and ``COLOURS``, -1 for background.

    A patch belongs to the thing that covers most of it if that covers more than 8 of its 64 pixels.
    """
    cells = canvas // PATCH
    best = np.full((cells + 3, cells + 3), 8 * 255, np.int32)  # a box near the edge may reach into empty patches
    kinds, colours = (np.full((cells + 3, cells + 3), -1, np.int8) for _ in range(2))
    for thing, x, y in things:
        left, top = x - BOX // 2, y - BOX // 2
        part = share(thing.kind, thing.size, thing.angle, left % PATCH, top % PATCH)
        window = (slice(top // PATCH, top // PATCH + 4), slice(left // PATCH, left // PATCH + 4))
        won = part > best[window]
        best[window][won] = part[won]
        kinds[window][won] = KINDS.index(thing.kind)
        colours[window][won] = COLOURS.index(thing.colour)
    return kinds[:cells, :cells].copy(), colours[:cells, :cells].copy()
