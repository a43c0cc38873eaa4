"""Videos that are pictures: a folder of frames, and animated pictures that no video decoder reads (WebP).

Both are read with Pillow through :mod:`tokenreduce.common.images`, so that frames look as pictures do everywhere else.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenreduce.common.images import BROKEN, EXTENSIONS, as_rgb, large_pictures, natural, open_picture, why
from tokenreduce.common.words import counted
from tokenreduce.video.errors import VideoError
from tokenreduce.video.index import Index, Way

__all__ = ["Animation", "Folder", "open_pictures"]

#: Frames per second of a folder whose rate nobody told.
RATE = 1.0
#: Seconds for which a frame is shown whose duration is stored as 0: what browsers do.
UNTOLD = 0.1
#: First bytes of animated formats that FFmpeg reads as well, which is left to it where PyAV is installed.
OTHERS = (b"GIF8", b"\x89PNG")

Keep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Folder:
    """Pictures ``files`` of one size, ``rate`` of them per second."""

    index: Index = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)

    def decode(self, wanted: Sequence[int], keep: Keep) -> tuple[list[int], list[str]]:
        """Give the frames ``wanted`` to ``keep``; those that are broken come back, and what is wrong with them."""
        missing, said = [], []
        for i in wanted:
            try:
                picture = np.asarray(open_picture(self.files[i], name=self.files[i].name))
                if picture.shape[:2] != (self.index.height, self.index.width):
                    raise ValueError(f"{self.files[i].name} is {picture.shape[1]}x{picture.shape[0]}")
            except (OSError, ValueError) as error:
                missing.append(i)
                said.append(str(error))
                continue
            keep(i, picture)
        return missing, said


@dataclass(frozen=True)
class Animation:
    """An animated picture ``path``, whose frame 0 is its picture ``first``."""

    index: Index = field(repr=False)
    path: Path
    first: int = 0

    def decode(self, wanted: Sequence[int], keep: Keep) -> tuple[list[int], list[str]]:
        """As :meth:`Folder.decode`."""
        missing, said = [], []
        with large_pictures(), Image.open(self.path) as opened:
            for i in wanted:
                try:
                    opened.seek(i + self.first)
                    keep(i, np.asarray(as_rgb(opened)))
                except BROKEN as error:
                    missing.append(i)
                    said.append(f"frame {i}: {why(error)}")
        return missing, said


def open_pictures(path: Path, rate: float | None = None) -> Folder | Animation | None:
    """``path`` as a video where it is a folder, or an animated picture that Pillow reads; None where it is neither.

    Raises :class:`VideoError` for a folder without pictures or with pictures of several sizes, and ``ValueError`` for a
    ``rate`` that is no number above 0 or that is given for a file, which has its own.
    """
    if rate is not None and (isinstance(rate, bool) or not np.isfinite(rate) or rate <= 0):
        raise ValueError(f"the rate of a folder of frames is a number of frames per second above 0, not {rate!r}")
    if path.is_dir():
        return _folder(path, RATE if rate is None else float(rate))
    if rate is not None:
        raise ValueError(f"a rate is for a folder of frames; {path} has times of its own")
    return _animation(path) if _by_pillow(path) else None


def _folder(path: Path, rate: float) -> Folder:
    found = sorted((f for f in path.iterdir() if not f.name.startswith(".")), key=lambda f: natural(f.name))
    files = tuple(f for f in found if f.suffix.lower().lstrip(".") in EXTENSIONS and not f.is_dir())
    if not files:
        inside = ", ".join(f.name for f in found[:3]) or "nothing"
        step = "name one video file in it, or a folder whose pictures are the frames"
        raise VideoError(path, f"this is a folder without a picture (it holds {inside})", step)
    width, height = _size(path, files)
    count = len(files)
    others = [f.name for f in found if f not in files]
    warnings = (f"{counted(len(others), 'file')} that is no picture left out: {others[0]}",) if others else ()
    return Folder(_index(np.arange(count) / rate, count / rate, width, height, "pictures", warnings), files)


def _size(path: Path, files: Sequence[Path]) -> tuple[int, int]:
    """Width and height of all ``files`` that are no broken pictures."""
    sizes: dict[tuple[int, int], Path] = {}
    last = ""
    for file in files:
        try:
            with large_pictures(), Image.open(file) as opened:
                # EXIF orientations from 5 on are quarter turns.
                turned = opened.getexif().get(0x0112, 1) >= 5
                sizes.setdefault(opened.size[::-1] if turned else opened.size, file)
        except BROKEN as error:
            last = f"{file.name}: {why(error)}"
        if len(sizes) > 1:
            (one, first), (two, other) = sizes.items()
            reason = f"its pictures differ in size: {first.name} is {one[0]}x{one[1]}, {other.name} {two[0]}x{two[1]}"
            raise VideoError(path, reason, "scale them to one size, or take out what is no frame")
    if not sizes:
        reason = f"none of its {counted(len(files), 'picture')} can be read ({last})"
        raise VideoError(path, reason, "copy or download them again")
    return next(iter(sizes))


def _by_pillow(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:  # who reads it says what is wrong
        return False
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    return head.startswith(OTHERS) and importlib.util.find_spec("av") is None


def _animation(path: Path) -> Animation:
    shown: list[float] = []
    try:
        with large_pictures(), Image.open(path) as opened:
            first = int(bool(getattr(opened, "default_image", False)))  # of an APNG, for programs that know no better
            width, height = opened.size
            for i in range(first, getattr(opened, "n_frames", 1)):
                opened.seek(i)
                opened.load()
                shown.append(float(opened.info.get("duration") or 1000 * UNTOLD) / 1000)
    except BROKEN as error:
        if not shown:
            reason = f"it cannot be read as an animated picture ({why(error)})"
            raise VideoError(path, reason, "copy or download it again") from error
    times = np.concatenate([[0.0], np.cumsum(shown)])
    return Animation(_index(times[:-1], float(times[-1]), width, height, "animated picture", ()), path, first)


def _index(times: Any, duration: float, width: int, height: int, codec: str, warnings: tuple[str, ...]) -> Index:
    count = len(times)
    fps = (count - 1) / float(times[-1]) if count > 1 else count / duration
    way = functools.partial(Way, np.zeros((0, 2), np.int64), np.zeros(count, np.int64), {})
    return Index(
        np.asarray(times, np.float64), 0.0, None, way, width, height, 0, fps, duration, codec, warnings=warnings
    )
