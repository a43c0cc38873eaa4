"""Files from strangers: images and videos, read with limits on bytes, pixels and time, and a reason where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from tokenreduce.common.images import BROKEN, PictureError, as_rgb, large_pictures, why
from tokenreduce.demo.apart import apart

__all__ = ["IMAGES", "VIDEOS", "image_from", "is_video", "video_from"]

#: Endings that are let in, with the decoder of Pillow that alone may read such files.
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
VIDEOS = (".mp4", ".mov", ".avi", ".webm", ".mkv")
MOST_BYTES, MOST_PIXELS = 32 << 20, 40_000_000
#: Longest side that is kept; no model here looks at more.
LONGEST = 1536


def is_video(path: str | Path) -> bool:
    """Whether a file is to be read as a video, by its name; of an animated GIF the first frame is an image."""
    return Path(path).suffix.lower() in VIDEOS


def image_from(path: str | Path, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The image in a file as RGB, upright, transparency on white, at most :data:`LONGEST` pixels long.

    Raises ``ValueError`` naming the file and what is wrong: another ending than :data:`IMAGES`, too many bytes or
    pixels (told before they are decoded), contents that are no image or broken.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGES:
        raise ValueError(f"{path.name} is no image that is read here; use one of {', '.join(IMAGES)}")
    _check_bytes(path, most_bytes)
    try:
        with large_pictures(), Image.open(path, formats=sorted(set(IMAGES.values()))) as opened:
            width, height = opened.size
            if width * height > most_pixels:
                most = f"at most {most_pixels / 1e6:g} million are read; make it smaller"
                raise PictureError(path.name, f"it has {width:,} x {height:,} pixels, and {most}")
            opened.draft("RGB", (LONGEST, LONGEST))  # JPEG is decoded at a smaller size where that is enough
            image = as_rgb(opened, upright=True)
    except BROKEN as error:
        reason = "its contents are no image" if isinstance(error, UnidentifiedImageError) else why(error)
        fix = "" if isinstance(error, PictureError) else "; save it again, as PNG or JPEG"
        raise PictureError(path.name, f"{reason}{fix}") from error
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
    return image


def video_from(
    path: str | Path, n: int, *, most_bytes: int = MOST_BYTES, seconds: float = 60.0, side: int = 448
) -> tuple[list[Image.Image], list[float]]:
    """``n`` frames at equal distances of a video, no side longer than ``side``, and their times in seconds.

    They are decoded in a process of its own, which is killed after ``seconds``. Raises ``ValueError`` that says why for
    a file that is no video, is too large or cannot be decoded, also where no reader of videos is installed.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEOS:
        raise ValueError(f"{path.name} is no video that is read here; use one of {', '.join(VIDEOS)}")
    _check_bytes(path, most_bytes)
    try:
        made = apart(frames_of, str(path.resolve()), n, side, seconds=seconds, what=f"decoding {path.name}")
    except ValueError as error:  # the name is enough: a visitor need not see where uploads lie
        raise ValueError(str(error).replace(str(path.resolve()), path.name)) from None
    return [Image.fromarray(frame) for frame in made["frames"]], made["times"].tolist()


def frames_of(path: str, n: int, side: int) -> dict[str, Any]:
    """``frames`` (T,H,W,3) uint8, no side longer than ``side``, and ``times``; what :func:`video_from` runs apart."""
    import numpy as np

    from tokenreduce.video import read_frames

    read = read_frames(path, n=n)
    small = []
    for frame in read.frames:
        image = Image.fromarray(frame)
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        small.append(np.asarray(image))
    return {"frames": np.stack(small), "times": read.times}


def _check_bytes(path: Path, most: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if size > most:
        raise ValueError(f"{path.name} has {size / 1e6:.1f} MB; at most {most / 1e6:.0f} MB are read")
    if size == 0:
        raise ValueError(f"{path.name} is empty")
