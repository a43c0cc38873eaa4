"""Drawing what a method kept: one small picture for its page, beside one of the pictures as they are."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.bench.gallery.kept import Kept
from tokenreduce.bench.gallery.pictures import clip, scenes
from tokenreduce.measure.picture import INK, PAPER, overlay, shaded

__all__ = ["FILES", "original", "sheet", "webp"]

#: The file with the pictures as they are, by what is drawn.
FILES = {"scenes": "pictures-scenes.webp", "clip": "pictures-clip.webp"}
GAP, LABEL, ROOM = 8, 18, 56
#: Width of one picture in pixels, alone and where there is one for each layer; frames of the clip in a row.
SIDES, FRAMES = {"scenes": (224, 96), "clip": (112, 56)}, 4


def original(pictures: str) -> Image.Image:
    """The "scenes" in a row, or the frames of the "clip" in several, as large as :func:`sheet` has them."""
    side = SIDES[pictures][0]
    images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in _images(pictures)]
    return _grid(_rows(images) if pictures == "clip" else [images])


def sheet(kept: Kept) -> Image.Image:
    """What is left of every picture, laid out as in :func:`original`. With heads every layer has its own, in which a
    patch is the paler the fewer heads hold its key: in a column for scenes, in a row of all frames for a clip.

    Raises ``ValueError`` where it is of other pictures, or of another number of them.
    """
    images, film = _images(kept.pictures), kept.pictures == "clip"
    if len(kept.maps) != (1 if film else len(images)):
        raise ValueError(f"{kept.spec}: {len(kept.maps)} maps of {len(images)} {kept.pictures}; make them again")
    if not film:
        rows = [_drawn(image, m, kept) for image, m in zip(images, kept.maps, strict=True)]
        if not kept.heads:
            return _grid([[one for row in rows for one in row]])
        return _grid(rows, above=[f"layer {i}" for i in range(len(kept.maps[0]))])
    # Frames are drawn as one picture, so that what was merged across them has one colour.
    strip = _strip(images)
    drawn = [_cut(one, len(images)) for one in _drawn(strip, kept.maps[0], kept)]
    return _grid(drawn, beside=[f"layer {i}" for i in range(len(drawn))]) if kept.heads else _grid(_rows(drawn[0]))


def webp(image: Image.Image) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=60, method=4)
    return out.getvalue()


def _images(pictures: str) -> tuple[Image.Image, ...]:
    if pictures not in SIDES:
        raise ValueError(f"pictures are {' or '.join(SIDES)}, not {pictures!r}")
    return clip() if pictures == "clip" else scenes()


def _drawn(image: Image.Image, what: np.ndarray, kept: Kept) -> list[Image.Image]:
    """``image`` with its tokens; one for each layer where there are heads."""
    alone, small = SIDES[kept.pictures]
    if not kept.heads:
        return [overlay(image, what, side=alone)]
    size = (image.width * small // image.height, small)
    return [shaded(image.resize(size, Image.Resampling.LANCZOS), layer / kept.heads, side=small) for layer in what]


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    made = Image.new("RGB", (sum(i.width for i in images), images[0].height))
    for number, image in enumerate(images):
        made.paste(image, (number * image.width, 0))
    return made


def _cut(strip: Image.Image, parts: int) -> list[Image.Image]:
    wide = strip.width // parts
    return [strip.crop((i * wide, 0, (i + 1) * wide, strip.height)) for i in range(parts)]


def _rows(frames: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [frames[i : i + FRAMES] for i in range(0, len(frames), FRAMES)]


def _grid(rows: Sequence[Sequence[Image.Image]], above: Sequence[str] = (), beside: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size, with words ``above`` columns and ``beside`` rows."""
    wide, high = rows[0][0].size
    left, top = (ROOM if beside else 0), (LABEL if above else 0)
    size = (left + len(rows[0]) * (wide + GAP) - GAP, top + len(rows) * (high + GAP) - GAP)
    canvas = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for column, word in enumerate(above):
        pen.text((left + column * (wide + GAP), 0), word, fill=INK, font=font)
    for row, word in enumerate(beside):
        pen.text((0, top + row * (high + GAP) + high // 2), word, fill=INK, font=font, anchor="lm")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            canvas.paste(image, (left + column * (wide + GAP), top + row * (high + GAP)))
    return canvas
