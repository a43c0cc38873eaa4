"""Pictures of things, signs and documents on a textured background of normal brightness, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenreduce.zoo.world.drawing import ANGLES, BOX, Draw, compose, reach, share, texture_pattern, tint
from tokenreduce.zoo.world.scenes import LATTICE, Thing, check_objects
from tokenreduce.zoo.world2.signs import (
    CELL,
    LETTERS,
    LONGEST,
    Document,
    Sign,
    check_text,
    extent,
    paint_document,
    paint_sign,
)
from tokenreduce.zoo.world2.vocabulary import CANVAS, CHARACTERS, COLOURS, GRID, KINDS, PATCH, TEXTURES

__all__ = [
    "CELL_OF", "CHARACTER_OF", "MOST", "PLATE_OF", "SIZES", "Labels", "Scene", "Thing", "ground", "labels_of", "scene",
]  # fmt: skip

SIZES = (10, 12, 14, 16, 18)
#: Most things and signs of a scene.
MOST = 10, 8
_ROOM = 6  # lattice cells that a thing has for itself, along an axis
_NEAR = 0.6  # share of signs with a thing beside them

#: Owners of patches are numbers: thing i is i; character j of sign i, the plate of sign i and a cell of the document:
CHARACTER_OF, PLATE_OF, CELL_OF = 100, 9, 200  # 100 + 10 i + j; 109 + 10 i; 200 + 3 row + column


@dataclass(frozen=True, eq=False)
class Labels:
    """What every patch shows, (28,28) each, -1 for nothing: index into ``KINDS``, ``COLOURS`` (of a thing or a plate)
    and ``CHARACTERS``; ``slots``: place on the sign (0..3), or 4 + 3 row + column in the document; ``owners``: whose
    it is (see ``CHARACTER_OF``)."""

    kinds: np.ndarray
    colours: np.ndarray
    characters: np.ndarray
    slots: np.ndarray
    owners: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with everything that is known about it.

    ``image`` (224,224,3) uint8; ``objects`` from left to right, no two with the same x; ``signs`` from left to right,
    no two of one colour; ``document`` may be None; ``labels`` per patch. Nothing overlaps.
    """

    image: np.ndarray = field(repr=False)
    objects: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    document: Document | None
    background: str
    labels: Labels = field(repr=False)
    seed: int


class _Board:
    """Free cells of the lattice."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.side = draw, CANVAS // LATTICE
        self.taken = np.zeros((self.side, self.side), dtype=np.int32)
        self.columns: set[int] = set()  # of things

    def place(self, wide: int, high: int, thing: int | None = None) -> tuple[int, int] | None:
        """A random free place (column, row) for ``wide`` x ``high`` cells, which it takes; None where there is none.

        ``thing`` is the column inside, at which a thing's middle comes: no two things share it.
        """
        total = np.zeros((self.side + 1, self.side + 1), dtype=np.int32)
        total[1:, 1:] = self.taken.cumsum(0).cumsum(1)
        full = total[high:, wide:] - total[:-high, wide:] - total[high:, :-wide] + total[:-high, :-wide]
        free = full == 0
        if thing is not None:
            for c in self.columns:
                if 0 <= c - thing < free.shape[1]:
                    free[:, c - thing] = False
        left = np.flatnonzero(free)
        if not len(left):
            return None
        row, column = divmod(int(left[self.draw.below(len(left))]), free.shape[1])
        self.taken[row : row + high, column : column + wide] = 1
        if thing is not None:
            self.columns.add(column + thing)
        return column, row


def _thing(draw: Draw, column: int, row: int, colours: list[str], copy_colour: float) -> Thing:
    """A thing whose room starts at a lattice cell."""
    copies = draw.random() < copy_colour and colours
    colour = draw.choice(colours) if copies else draw.choice(COLOURS)
    colours.append(colour)
    turn = draw.random()
    angle = ANGLES[0] if turn < 0.6 else ANGLES[1] if turn < 0.8 else ANGLES[2]
    x, y = LATTICE * (column + _ROOM // 2), LATTICE * (row + _ROOM // 2)
    return Thing(draw.choice(KINDS), colour, x, y, draw.choice(SIZES), angle)


def _sign(
    draw: Draw, board: _Board, text: str, colour: str, beside: bool
) -> tuple[Sign, tuple[int, int] | None] | None:
    """A sign, and where the room of a thing beside it starts."""
    size = draw.choice(tuple(LETTERS))
    wide, high = (n // LATTICE for n in extent(len(text), size))
    if not beside:
        place = board.place(wide, high)
        return None if place is None else (Sign(text, colour, LATTICE * place[0], LATTICE * place[1], size), None)
    first, across = draw.below(2), draw.below(2)
    whole = (wide + _ROOM, max(high, _ROOM)) if across else (max(wide, _ROOM), high + _ROOM)
    at = (0 if first else wide, (whole[1] - _ROOM) // 2) if across else ((whole[0] - _ROOM) // 2, 0 if first else high)
    own = (_ROOM * first, (whole[1] - high) // 2) if across else ((whole[0] - wide) // 2, _ROOM * first)
    place = board.place(*whole, thing=at[0] + _ROOM // 2)
    if place is None:
        return None
    sign = Sign(text, colour, LATTICE * (place[0] + own[0]), LATTICE * (place[1] + own[1]), size)
    return sign, (place[0] + at[0], place[1] + at[1])


def _document(draw: Draw, board: _Board) -> Document | None:
    columns, rows = draw.between(2, 3), draw.between(2, 3)
    digits = tuple("".join(draw.choice(CHARACTERS[:10]) for _ in range(columns)) for _ in range(rows))
    place = board.place(columns * CELL // LATTICE, rows * CELL // LATTICE)
    return None if place is None else Document(digits, LATTICE * place[0], LATTICE * place[1])


def scene(
    seed: int,
    *,
    objects: tuple[int, int] = (3, 10),
    signs: tuple[int, int] = (1, 3),
    document: float = 0.4,
    copy_colour: float = 0.25,
    texts: Sequence[str] | None = None,
) -> Scene:
    """The scene of ``seed``: so many things and signs, a document in a share ``document`` of the scenes.

    ``texts`` are those of the signs, instead of random ones. Raises ``ValueError`` for a text that the font cannot
    draw and for counts that do not fit (10 things, 8 signs).
    """
    check_objects(objects, MOST[0], f"{CANVAS} x {CANVAS} pixels")
    if texts is not None:
        texts = [check_text(t) for t in texts]
        signs = len(texts), len(texts)
    if not 0 <= signs[0] <= signs[1] <= MOST[1]:
        raise ValueError(f"signs must be (least, most) with 0 <= least <= most <= {MOST[1]}, not {signs}")
    if not (0 <= copy_colour <= 1 and 0 <= document <= 1):
        raise ValueError(f"copy_colour and document are shares in [0, 1], not {copy_colour} and {document}")
    draw = Draw(10, seed)
    texture, board = draw.choice(TEXTURES), _Board(draw)
    paper = _document(draw, board) if draw.random() < document else None
    n = draw.between(*objects)
    colours: list[str] = []
    things: list[Any] = []
    plates: list[Any] = []
    for i, colour in enumerate(draw.sample(COLOURS, draw.between(*signs))):
        text = texts[i] if texts else "".join(draw.choice(CHARACTERS) for _ in range(draw.between(1, LONGEST)))
        beside = len(things) < n and draw.random() < _NEAR
        if (made := _sign(draw, board, text, colour, beside)) is None:
            raise ValueError(f"the scene of seed {seed} has no room for the sign {text!r}")
        plates.append(made[0])
        if made[1]:
            things.append(_thing(draw, *made[1], colours, copy_colour))
    while len(things) < n:
        place = board.place(_ROOM, _ROOM, thing=_ROOM // 2)
        if place is None:
            raise ValueError(f"the scene of seed {seed} has no room for {n} things")
        things.append(_thing(draw, *place, colours, copy_colour))
    objects_ = tuple(sorted(things, key=lambda t: t.x))
    signs_ = tuple(sorted(plates, key=lambda s: (s.x, s.y)))
    image = _paint(draw, texture, objects_, signs_, paper)
    return Scene(image, objects_, signs_, paper, texture, labels_of(objects_, signs_, paper), int(seed))


def ground(texture: str, draw: Draw) -> np.ndarray:
    """(224,224,3) int16: mean 45..135, amplitude 10..24, low saturation, without noise."""
    mean, amplitude = draw.between(45, 135), draw.between(10, 24)
    base = np.array([mean + draw.between(-10, 10) for _ in range(3)], dtype=np.int16)
    return (texture_pattern(texture, draw, CANVAS) * amplitude >> 8).astype(np.int16)[..., None] + base


def _paint(
    draw: Draw, texture: str, things: Sequence[Thing], signs: Sequence[Sign], document: Document | None
) -> np.ndarray:
    out = ground(texture, draw)
    if document:
        paint_document(out, document)
    for sign in signs:
        paint_sign(out, sign, tint(sign.colour, draw))
    return compose(out, [(t, t.x, t.y, tint(t.colour, draw)) for t in things], draw)


def _overlap(start: int, stop: int) -> np.ndarray:
    """(28,) pixels that [start, stop) has in common with every patch along an axis."""
    edges = PATCH * np.arange(GRID)
    return np.clip(np.minimum(stop, edges + PATCH) - np.maximum(start, edges), 0, PATCH)


def labels_of(
    things: Sequence[Thing], signs: Sequence[Sign], document: Document | None, numbers: Sequence[int] | None = None
) -> Labels:
    """The labels of a picture; ``numbers`` are those of the things, in their order where nothing is said.

    A patch belongs to what covers most of it, if that is at least an eighth (things) or a quarter (characters).
    """
    best = np.zeros((GRID, GRID), np.int32)
    found = np.full((5, GRID, GRID), -1, np.int16)

    def claim(area: np.ndarray, least: int, *values: int) -> None:
        won = (area >= least) & (area >= best)
        best[won] = area[won]
        found[:, won] = np.array(values, np.int16)[:, None]

    def box(b: tuple[int, int, int, int]) -> np.ndarray:
        area: np.ndarray = _overlap(b[1], b[3])[:, None] * _overlap(b[0], b[2])[None]
        return area

    for i, t in zip(range(len(things)) if numbers is None else numbers, things, strict=True):
        left, top = t.x - BOX // 2, t.y - BOX // 2
        page = np.zeros((GRID + 3, GRID + 3), np.int32)  # a box near the edge may reach into empty patches
        part = share(t.kind, t.size, t.angle, left % PATCH, top % PATCH) // 255
        page[top // PATCH : top // PATCH + 4, left // PATCH : left // PATCH + 4] = part
        claim(page[:GRID, :GRID], 8, KINDS.index(t.kind), COLOURS.index(t.colour), -1, -1, i)
    for i, s in enumerate(signs):
        colour = COLOURS.index(s.colour)
        for j, (character, b) in enumerate(zip(s.text, s.characters, strict=True)):
            claim(box(b), 16, -1, colour, CHARACTERS.index(character), j, CHARACTER_OF + 10 * i + j)
        area = np.where(found[2] < 0, box(s.box), 0)
        claim(area, 24, -1, colour, -1, -1, CHARACTER_OF + 10 * i + PLATE_OF)
    for r, row in enumerate(document.cells if document else ()):
        for c, b in enumerate(row):
            digit = CHARACTERS.index(document.rows[r][c])  # type: ignore[union-attr]
            claim(box(b), 16, -1, -1, digit, 4 + 3 * r + c, CELL_OF + 3 * r + c)
    return Labels(*found.astype(np.int64))


assert reach(max(SIZES)) <= LATTICE * _ROOM // 2
