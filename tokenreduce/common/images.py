"""Opening pictures: every file that becomes an input goes through here, and comes out as 8-bit RGB or with a reason.

A picture looks as in a viewer. 16-bit grey is scaled by its range (65,535 is white), transparency lies on white paper,
palettes, CMYK and bilevel pictures become colours. Floats are 0 to 1, or 0 to 255 where they go far above 1. What has
no range that a viewer would know (other floats, NaN, 32-bit integers beyond 16 bits) is refused: a guess would give a
picture, and figures, that look right and are not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["EXTENSIONS", "PictureError", "as_rgb", "large_pictures", "natural", "open_picture", "why"]

#: Endings of files that are taken for pictures.
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")

#: Floats whose highest is between 1 and this may be of either range: 0 to 1 overshot, or 0 to 255 in the dark.
DIM = 16
#: Tags of a TIFF: bits of a value, what 0 is (0: white), and the kind of numbers (2: with a sign).
_BITS, _PHOTOMETRIC, _KIND = 258, 262, 339
#: What Pillow raises for files that are broken or no pictures.
BROKEN = (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError)


class PictureError(ValueError):
    """A picture cannot be used. ``reason`` says why, without the name of the file."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)


def open_picture(
    source: str | Path | IO[bytes], *, name: str = "", formats: tuple[str, ...] | None = None, upright: bool = True
) -> Image.Image:
    """The picture in a file, or in an open one, as RGB.

    Args:
        source: the file.
        name: what errors call it; its path by default.
        formats: decoders of Pillow that may be used; all by default.
        upright: turn it as its EXIF orientation says.

    Raises ``FileNotFoundError`` where there is no file, and :class:`PictureError` (a ``ValueError``) for one that is no
    picture, broken, too large, or without a range of brightness (see above).
    """
    name = name or str(source if isinstance(source, str | Path) else getattr(source, "name", "the picture"))
    try:
        with large_pictures(), Image.open(source, formats=formats) as opened:
            return as_rgb(opened, upright=upright)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {name}") from None
    except BROKEN as error:
        raise PictureError(name, why(error)) from error


@contextmanager
def large_pictures() -> Iterator[None]:
    """No warning of Pillow's inside about pictures that are large but still read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def why(error: BaseException) -> str:
    """What is wrong with a picture, from what Pillow or :func:`as_rgb` raised."""
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\d+", str(error))
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        size = f"{int(found[0]):,} pixels" if found else "too many pixels"
        return f"it has {size}, and at most {most:,} are read; make it smaller"
    if isinstance(error, PictureError):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "its contents are no image: " + " ".join(str(error).split())
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def as_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """``image`` as 8-bit RGB; one that is that already comes back itself. Decodes it where that was not done yet.

    Raises ``ValueError`` for values without a range that a viewer would know, and what Pillow raises for broken files.
    """
    image.load()
    made = _Made.of(image)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey(image, made)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # Pillow has no way from every mode to RGBA: bilevel pictures go over grey, premultiplied grey over LA.
        if image.mode in ("1", "La"):
            image = image.convert("L" if image.mode == "1" else "LA")
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class _Made:
    """What a TIFF says of its values, which Pillow passes by."""

    wide: bool = False  # 32 bits; of other formats, Pillow reads 16 bits into the same mode
    white: int = 65535  # the highest value of its bits
    negative: bool = False  # 0 is white

    @classmethod
    def of(cls, image: Image.Image) -> _Made:
        """Raises ``ValueError`` for 8 or 16 bits with a sign, which Pillow reads as if they had none."""
        tags = getattr(image, "tag_v2", None)
        if image.format != "TIFF" or tags is None:
            return cls()
        bits, kinds = (tuple(np.atleast_1d(tags.get(tag, 1))) for tag in (_BITS, _KIND))
        if 2 in kinds and bits[0] < 32:
            raise ValueError("it has integers with a sign, which say no brightness; save it as 8-bit or 16-bit")
        wide = image.mode == "I"
        negative = tags.get(_PHOTOMETRIC) == 0 and image.mode != "L"  # Pillow does it for 8 bits
        return cls(wide, 65535 if wide or image.mode == "F" else 2 ** int(bits[0]) - 1, negative)


def _grey(image: Image.Image, made: _Made) -> np.ndarray:
    """(H,W) uint8 of a picture with up to 16-bit, floating point or 32-bit values."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are NaN or infinite")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    span = f"its values go from {values.min(initial=np.inf):g} to {high:g}"
    if image.mode == "F":
        if low < 0 or high > 255 or 1 < high < DIM:
            raise ValueError(f"{span}, and floats are read from 0 to 1 or 0 to 255; scale them, or save it as 16-bit")
        values = values * 255 if high <= 1 else values
    else:
        if low < 0 or high > made.white or (made.wide and 0 < high <= 255):
            raise ValueError(f"{span} of 32-bit integers, which say no brightness; save it as 8-bit or 16-bit")
        clear = image.info.get("transparency")
        paper = np.asarray(image) == clear if isinstance(clear, int) else False
        values = np.where(paper, 255, values * (255 / made.white))
    values = 255 - values if made.negative else values
    return (values + 0.5).clip(0, 255).astype(np.uint8)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts names by the numbers in them.

    >>> sorted(["f10.png", "f9.png", "F1.png"], key=natural)
    ['F1.png', 'f9.png', 'f10.png']
    """
    parts = re.split(r"(\d+)", name)
    # Of equal numbers the one with fewer zeros in front comes first, so that the order never hangs on the system's.
    return tuple((int(p), len(p), "") if i % 2 else (-1, 0, p.lower()) for i, p in enumerate(parts))
