"""Pictures of a few coloured things on a dark background, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenreduce.zoo.world.drawing import ANGLES, BOX, SIZES, Draw, background, compose, labels, reach, tint
from tokenreduce.zoo.world.vocabulary import CANVAS, COLOURS, KINDS, PATCH, TEXTURES

__all__ = ["Scene", "Thing", "scene"]

#: Centres lie on multiples of this many pixels: a small encoder learns kinds many times faster than from free places.
LATTICE = 4


@dataclass(frozen=True)
class Thing:
    """A thing of ``kind`` and ``colour`` with its centre (x, y) and size in pixels and its rotation in degrees."""

    kind: str
    colour: str
    x: int
    y: int
    size: int
    angle: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with everything that is known about it.

    ``image`` (H,W,3) uint8; ``kinds`` and ``colours`` (H/8,W/8) int8 hold per patch an index into ``KINDS`` and
    ``COLOURS``, -1 for background; ``background`` is one of ``TEXTURES``. Things do not overlap.
    """

    image: np.ndarray = field(repr=False)
    objects: tuple[Thing, ...]
    background: str
    kinds: np.ndarray = field(repr=False)
    colours: np.ndarray = field(repr=False)
    seed: int


def bounds(canvas: int) -> tuple[int, int]:
    """Smallest and largest coordinate of a centre."""
    low = -(-BOX // 2 // LATTICE) * LATTICE
    return low, (canvas - BOX // 2) // LATTICE * LATTICE


def check_objects(objects: tuple[int, int], fit: int, where: str) -> None:
    """Raise ``ValueError`` unless ``objects`` is (least, most) with 1 <= least <= most <= fit."""
    low, high = objects
    if not 1 <= low <= high:
        raise ValueError(f"objects must be (least, most) with 1 <= least <= most, not {objects}")
    if high > fit:
        raise ValueError(f"objects={objects}: only {fit} fit into {where}")


def looks(draw: Draw, n: int, copy_colour: float) -> list[tuple[str, str, int, int]]:
    """``n`` times (kind, colour, size, angle); after the first, a share of ``copy_colour`` repeats a colour."""
    out: list[tuple[str, str, int, int]] = []
    for i in range(n):
        copies = draw.random() < copy_colour and i > 0
        colour = out[draw.below(i)][1] if copies else draw.choice(COLOURS)
        turn = draw.random()
        angle = ANGLES[0] if turn < 0.6 else ANGLES[1] if turn < 0.8 else ANGLES[2]
        out.append((draw.choice(KINDS), colour, draw.choice(SIZES), angle))
    return out


def _places(draw: Draw, reaches: list[int], canvas: int) -> list[tuple[int, int]]:
    """Centres on the lattice at which boxes of these half sides do not overlap."""
    low, high = bounds(canvas)
    side = (high - low) // LATTICE + 1
    out: list[tuple[int, int]] = []
    for i, own in enumerate(reaches):
        free = np.ones((side, side), dtype=bool)
        for (x, y), other in zip(out, reaches[:i], strict=True):
            far = (own + other - 1) // LATTICE  # lattice steps that are still too near
            row, column = (y - low) // LATTICE, (x - low) // LATTICE
            free[max(0, row - far) : row + far + 1, max(0, column - far) : column + far + 1] = False
        left = np.flatnonzero(free)
        if not len(left):
            break
        row, column = divmod(int(left[draw.below(len(left))]), side)
        out.append((low + LATTICE * column, low + LATTICE * row))
    else:
        return out
    # The first ones left no room for the rest: random cells of a regular grid, which hold any thing.
    axis = range(low, high + 1, BOX)
    return draw.sample([(x, y) for y in axis for x in axis], len(reaches))


def scene(seed: int, *, objects: tuple[int, int] = (2, 6), copy_colour: float = 0.25, canvas: int = CANVAS) -> Scene:
    """The scene of ``seed``: between ``objects[0]`` and ``objects[1]`` things on a ``canvas`` x ``canvas`` picture.

    A share ``copy_colour`` of the things after the first takes the colour of an earlier one; 0.45 gives many
    questions about shared colours. Raises ``ValueError`` for a bad setting and when the things do not fit.
    """
    if canvas % PATCH or canvas < 24:
        raise ValueError(f"canvas must be a multiple of {PATCH} and at least 24, not {canvas}")
    if not 0 <= copy_colour <= 1:
        raise ValueError(f"copy_colour must be in [0, 1], not {copy_colour}")
    low, high = bounds(canvas)
    check_objects(objects, ((high - low) // BOX + 1) ** 2, f"{canvas} x {canvas} pixels")
    draw = Draw(0, seed)
    texture = draw.choice(TEXTURES)
    chosen = looks(draw, draw.between(*objects), copy_colour)
    places = _places(draw, [reach(size) for _, _, size, _ in chosen], canvas)
    things = tuple(Thing(k, c, x, y, s, a) for (k, c, s, a), (x, y) in zip(chosen, places, strict=True))
    base = background(texture, draw, canvas)
    image = compose(base, [(t, t.x, t.y, tint(t.colour, draw)) for t in things], draw)
    kinds, colours = labels([(t, t.x, t.y) for t in things], canvas)
    return Scene(image, things, texture, kinds, colours, int(seed))
