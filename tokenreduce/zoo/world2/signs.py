"""Signs and documents: texts of one to four characters on a coloured plate, and tables of digits on paper.

Everything stands on a lattice of 4 px, and every character has a column of at least a patch for itself: so a small
encoder reads sizes down to 6 px within minutes, which it does not from free places.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.zoo.world2.vocabulary import CHARACTERS

__all__ = ["CELL", "LETTERS", "LONGEST", "Document", "Sign", "check_text", "paint_document", "paint_sign"]

#: Height of a capital in pixels, by which accuracies of reading are reported, with (advance, line) in pixels.
LETTERS = {6: (8, 8), 8: (8, 8), 10: (8, 12), 12: (12, 12), 16: (12, 16)}
LONGEST = 4
MARGIN = 4
#: Side of a document's cell and of the box of its digit, and the digit's height.
CELL, INSIDE, DIGIT = 16, 12, 11
_FINE = 4  # characters are drawn this much larger and averaged
_PAPER, _INK = 225, 30

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sign:
    """``text`` (lower case) in capitals of ``size`` px on a plate of ``colour`` whose top left corner is (x, y)."""

    text: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> Box:
        """(left, top, right, bottom) of the plate in pixels."""
        wide, high = extent(len(self.text), self.size)
        return self.x, self.y, self.x + wide, self.y + high

    @property
    def characters(self) -> list[Box]:
        """The box of every character."""
        advance, line = LETTERS[self.size]
        left, top = self.x + MARGIN, self.y + MARGIN
        return [(left + advance * i, top, left + advance * (i + 1), top + line) for i in range(len(self.text))]


@dataclass(frozen=True)
class Document:
    """A table: ``rows`` of digits, all of one length, with its top left corner at (x, y)."""

    rows: tuple[str, ...]
    x: int
    y: int

    @property
    def box(self) -> Box:
        """(left, top, right, bottom) of the paper in pixels."""
        return self.x, self.y, self.x + CELL * len(self.rows[0]), self.y + CELL * len(self.rows)

    @property
    def cells(self) -> list[list[Box]]:
        """The box of every digit, row by row."""
        off = (CELL - INSIDE) // 2
        lefts = [self.x + CELL * c + off for c in range(len(self.rows[0]))]
        tops = [self.y + CELL * r + off for r in range(len(self.rows))]
        return [[(left, top, left + INSIDE, top + INSIDE) for left in lefts] for top in tops]


def extent(n: int, size: int) -> tuple[int, int]:
    """Width and height in pixels of a plate with ``n`` characters."""
    advance, line = LETTERS[size]
    return n * advance + 2 * MARGIN, line + 2 * MARGIN


def check_text(text: str) -> str:
    """``text`` in lower case. Raises ``ValueError`` naming the characters that the font cannot draw, and for a text
    that is empty or longer than a sign."""
    low = text.lower()
    if unknown := sorted(set(low) - set(CHARACTERS)):
        raise ValueError(
            f"the font of signs cannot draw {', '.join(map(repr, unknown))} (in {text!r}); it has {''.join(CHARACTERS)}"
        )
    if not 1 <= len(low) <= LONGEST:
        raise ValueError(f"a sign has 1 to {LONGEST} characters, not {len(low)} ({text!r})")
    return low


@functools.cache
def glyph(character: str, size: int, wide: int, high: int) -> np.ndarray:
    """Coverage (high,wide) int32 in 0..255 of a capital of ``size`` px in the middle of its box."""
    font = ImageFont.load_default(round(size * _FINE / 0.72))
    side = 4 * size * _FINE
    page = Image.new("L", (side, side))
    ImageDraw.Draw(page).text((side // 4, side // 4), character.upper(), fill=255, font=font, stroke_width=1,
                              stroke_fill=255)  # fmt: skip
    ink = page.crop(page.getbbox())
    ink = ink.resize((min(ink.width, (wide - 1) * _FINE), min(ink.height, high * _FINE)))
    tile = Image.new("L", (wide * _FINE, high * _FINE))
    tile.paste(ink, ((tile.width - ink.width) // 2, (tile.height - ink.height) // 2))
    fine = np.asarray(tile, dtype=np.int64).reshape(high, _FINE, wide, _FINE)
    return ((fine.sum((1, 3)) + _FINE**2 // 2) // _FINE**2).astype(np.int32)


def _write(out: np.ndarray, character: str, size: int, box: Box, ink: np.ndarray | int) -> None:
    left, top, right, bottom = box
    alpha = glyph(character, size, right - left, bottom - top)[..., None]
    part = out[top:bottom, left:right]
    part[:] = (part * (255 - alpha) + ink * alpha + 127) // 255


def paint_sign(out: np.ndarray, sign: Sign, rgb: np.ndarray) -> None:
    """Paint ``sign`` with a plate of ``rgb`` into ``out`` (H,W,3) int16: dark ink on a light plate, light on dark."""
    left, top, right, bottom = sign.box
    out[top:bottom, left:right] = rgb
    light = int(rgb @ np.array([3, 6, 1])) > 1150
    for character, box in zip(sign.text, sign.characters, strict=True):
        _write(out, character, sign.size, box, 15 if light else 250)


def paint_document(out: np.ndarray, document: Document) -> None:
    """Paint ``document`` into ``out`` (H,W,3) int16: dark digits and lines on light paper."""
    left, top, right, bottom = document.box
    paper = out[top:bottom, left:right]
    paper[:] = _PAPER
    paper[::CELL] = paper[:, ::CELL] = 150
    paper[-1] = paper[:, -1] = 150
    for digits, boxes in zip(document.rows, document.cells, strict=True):
        for digit, box in zip(digits, boxes, strict=True):
            _write(out, digit, DIGIT, box, _INK)
