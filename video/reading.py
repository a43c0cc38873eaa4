"""Read frames of a video file with their true times: decord where it is right, PyAV everywhere else.

>>> from tokenreduce.video import read_frames
>>> read_frames("film.mp4", n=16).frames.shape                  # doctest: +SKIP
(16, 720, 1280, 3)

Both readers give the same pictures, upright and in RGB. Only the frames asked for are held in memory, and only from the
keyframe before each of them on is anything decoded. Pixels that are not square are left as they are stored.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.video import pyav_reader
from tokenreduce.video.decord_reader import Decord, Distrust, open_alone
from tokenreduce.video.errors import VideoError, need
from tokenreduce.video.index import Index, check_file, read_index
from tokenreduce.video.picture_reader import Animation, Folder, open_pictures
from tokenreduce.video.sampling import at_times, by_fps, uniform

__all__ = ["READERS", "Frames", "Video", "VideoError", "open_video", "read_frames"]

READERS = ("auto", "decord", "pyav")


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of a video.

    Attributes:
        frames: (T,H,W,3) uint8, RGB, upright.
        times: (T,) float64, seconds at which each is shown; the first frame of the file is at 0.
        indices: (T,) int64, which frames of the file, counted from 0 in the order of showing.
        fps: mean frames per second of the file.
        duration: seconds of the file, to the end of its last frame.
        count: frames in the file.
        reader: "decord", "pyav" or "pillow", which decoded them.
        start: what the file itself calls the time of its first frame, in seconds; ``times + start`` is on its clock.
        rotation: degrees clockwise by which pictures were turned, as the file asks.
        missing: frames asked for that could not be decoded; they are left out of all the above.
        warnings: what is wrong with the file.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    times: NDArray[np.float64] = field(repr=False)
    indices: NDArray[np.int64] = field(repr=False)
    fps: float
    duration: float
    count: int
    reader: str
    start: float = 0.0
    rotation: int = 0
    missing: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame."""
        return self.frames.shape[2], self.frames.shape[1]


class Video:
    """An open video file; made by :func:`open_video`. Reading several times costs one look at its packets.

    Attributes:
        path: the file.
        times: (count,) float64 seconds of all its frames.
        fps, duration, count, start, rotation, warnings: as in :class:`Frames`.
        size: width and height of an upright frame.
        reader: "decord", "pyav", or "pillow" for animated WebP and folders of frames.
        why: why PyAV reads it though decord was there to be used; empty otherwise.
    """

    def __init__(
        self, path: Path, index: Index, decord: Decord | None, why: str = "", insist: bool = False,
        pictures: Folder | Animation | None = None,
    ) -> None:  # fmt: skip
        self.path, self.why, self._insist = path, why, insist
        self._index, self._decord, self._pictures = index, decord, pictures
        self.times = index.times
        self.fps, self.duration, self.count = index.fps, index.duration, index.count
        self.start, self.rotation, self.warnings = index.start, index.rotation, index.warnings
        self.size = (index.width, index.height)

    @property
    def reader(self) -> str:
        if self._pictures is not None:
            return "pillow"
        return "pyav" if self._decord is None else "decord"

    def choose(
        self,
        n: int | None = None,
        *,
        fps: float | None = None,
        indices: Sequence[int] | None = None,
        times: Sequence[float] | None = None,
        repeat: bool = False,
    ) -> list[int]:
        """Indices of frames, by one of the rules of :func:`read_frames`."""
        given = [k for k, v in {"n": n, "fps": fps, "indices": indices, "times": times}.items() if v is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of n, fps, indices, times, not {' and '.join(given) or 'none'}")
        if n is not None:
            return uniform(self.count, n, repeat=repeat)
        if fps is not None:
            return by_fps(self.times, fps, self.duration)
        if times is not None:
            wanted = np.asarray(times, np.float64)
            outside = wanted[~((wanted >= 0) & (wanted <= self.duration))]
            if len(outside):
                raise VideoError(
                    self.path, f"there is no frame at {outside[0]:g} s", f"ask for times of 0 to {self.duration:.3f} s"
                )
            return at_times(self.times, wanted)
        asked = [int(i) for i in np.asarray(indices).reshape(-1)]
        wrong = [i for i in asked if not 0 <= i < self.count]
        if wrong:
            raise VideoError(
                self.path, f"there is no frame {wrong[0]}", f"it has {self.count}: ask for 0 to {self.count - 1}"
            )
        return asked

    def read(self, indices: Sequence[int], *, size: int | None = None, max_pixels: int | None = None) -> Frames:
        """Decode these frames, in this order, repeated ones once; ``size`` and ``max_pixels`` as in
        :func:`read_frames`. Raises :class:`VideoError` for an index outside, and where none can be decoded."""
        asked = self.choose(indices=indices)
        if not asked:
            raise ValueError("indices names no frame")
        width, height = _fit(self.size, size, max_pixels)
        wanted = sorted(set(asked))
        missing: list[int] = []
        warnings = list(self.warnings)
        pictures = None
        if self._decord is not None:
            try:
                pictures = self._by_decord(wanted, width, height)
            except Distrust as doubt:
                if self._insist:
                    raise VideoError(self.path, f"decord fails ({doubt})", 'use reader="auto" or "pyav"') from doubt
                if importlib.util.find_spec("av") is None:
                    raise VideoError(self.path, str(doubt), "install PyAV: pip install 'tokenreduce[video]'") from doubt
                self._decord, self.why = None, str(doubt)
        broken: list[str] = []
        if pictures is None:
            pictures, missing, patched, broken = self._by_frame(wanted, width, height)
            if patched:
                warnings.append(f"{patched} of the frames read are damaged, and were patched up by the decoder")
        if missing:
            lost = set(missing)
            asked, wanted = [i for i in asked if i not in lost], [i for i in wanted if i not in lost]
            first = f" ({broken[0]})" if broken else ""
            warnings.append(f"{len(missing)} of the frames asked for cannot be decoded and are left out{first}")
            if not asked:
                reason = f"none of the frames asked for can be decoded{first}"
                raise VideoError(self.path, reason, "copy or download it again")
        if asked != wanted:
            pictures = pictures[np.searchsorted(wanted, asked)]
        return Frames(
            pictures, self.times[asked], np.array(asked, np.int64), self.fps, self.duration, self.count, self.reader,
            self.start, self.rotation, tuple(missing), tuple(warnings),
        )  # fmt: skip

    def _by_decord(self, wanted: list[int], width: int, height: int) -> NDArray[np.uint8]:
        assert self._decord is not None
        if (width, height) == self.size:
            return self._decord.frames(wanted)
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        places = {i: at for at, i in enumerate(wanted)}

        def keep(i: int, picture: np.ndarray) -> None:
            out[places[i]] = _scaled(picture, width, height)

        self._decord.decode(wanted, keep)
        return out

    def _by_frame(
        self, wanted: list[int], width: int, height: int
    ) -> tuple[NDArray[np.uint8], list[int], int, list[str]]:
        """With PyAV or Pillow: frames, those missing, how many are patched up, and what is wrong with the missing."""
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        places = {i: at for at, i in enumerate(wanted)}

        def keep(i: int, picture: np.ndarray) -> None:
            out[places[i]] = _scaled(picture, width, height)

        said: list[str] = []
        patched = 0
        if self._pictures is not None:
            missing, said = self._pictures.decode(wanted, keep)
        else:
            missing, patched = pyav_reader.decode(self.path, self._index, wanted, keep)
        if missing:
            lost = set(missing)
            out = out[[at for at, i in enumerate(wanted) if i not in lost]]
        return out, missing, patched, said


def open_video(path: str | PathLike[str], reader: str = "auto", *, rate: float | None = None) -> Video:
    """Look at a video file: count, times and size of its frames, and which reader gives the right ones.

    Args:
        path: the file, or a folder whose pictures are the frames, in the order of the numbers in their names.
        reader: "auto" is decord where it can be relied on, PyAV otherwise (``Video.why`` says why), and Pillow for
            folders and animated WebP. "decord" insists, and raises where decord would give wrong frames; "pyav" never
            uses decord.
        rate: frames per second of a folder of frames, 1 by default.

    Raises :class:`VideoError` for a file that cannot be read, and a folder without pictures or with pictures of several
    sizes; ``ValueError`` for an unknown reader or a rate that makes no sense; ``ImportError`` where what is needed is
    not installed.
    """
    if reader not in READERS:
        raise ValueError(f"reader is one of {', '.join(READERS)}, not {reader!r}")
    path = Path(path)
    pictures = open_pictures(path, rate)
    if pictures is not None and (reader == "auto" or path.is_dir()):
        if reader != "auto":
            raise VideoError(path, f"{reader} reads video files, and this is a folder", 'use reader="auto"')
        return Video(path, pictures.index, None, pictures=pictures)
    has = {name: importlib.util.find_spec(name) is not None for name in ("av", "decord")}
    if reader == "decord" or not has["av"]:
        need("decord" if reader != "pyav" else "av")
    if not has["av"]:
        check_file(path)
        decord, index = open_alone(path)
        return Video(path, index, decord)
    index = read_index(path)
    if reader == "pyav" or not has["decord"]:
        return Video(path, index, None)
    try:
        return Video(path, index, Decord(path, index), insist=reader == "decord")
    except Distrust as doubt:
        if reader == "decord":
            raise VideoError(path, f"decord gets this file wrong ({doubt})", 'use reader="auto" or "pyav"') from doubt
        return Video(path, index, None, str(doubt))


def read_frames(
    path: str | PathLike[str],
    n: int | None = None,
    *,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    times: Sequence[float] | None = None,
    size: int | None = None,
    max_pixels: int | None = None,
    reader: str = "auto",
    repeat: bool = False,
    rate: float | None = None,
) -> Frames:
    """Frames of a video file, chosen by exactly one of ``n``, ``fps``, ``indices`` and ``times``.

    Args:
        path: the file, an animated picture, or a folder whose pictures are the frames (sorted by the numbers in their
            names).
        n: that many, spread evenly with the first and the last one, ``linspace(0, count - 1, n)`` cut to integers as
            LLaVA does. A file with fewer gives each of its frames once; with ``repeat=True`` still n, some repeatedly.
        fps: the frame on screen every ``1/fps`` seconds, by timestamps; each frame at most once.
        indices: these, in this order.
        times: the frame on screen at each of these seconds.
        size: shrink frames so that the short side has this many pixels.
        max_pixels: shrink frames to at most this many pixels each. Frames are never enlarged.
        reader: "auto", "decord" or "pyav", see :func:`open_video`.
        repeat: see ``n``.
        rate: of a folder, how many of its frames make a second. Without it, ``fps`` says so, alone (then all frames are
            read) or beside one of the others, and without both it is 1.

    A file that is cut off or damaged gives what can be read and says so in ``warnings`` and ``missing``.

    Raises :class:`VideoError`, a ``ValueError``, with path, reason and next step, for a file that is missing, empty, no
    video, without picture or frames, of an unknown codec, or without the frame asked for; ``ValueError`` for settings
    that make no sense; ``ImportError`` where neither decord nor PyAV is installed.
    """
    if rate is None and fps is not None and Path(path).is_dir():
        rate, fps = fps, None
        n, repeat = (sys.maxsize, False) if n is None and indices is None and times is None else (n, repeat)
    video = open_video(path, reader, rate=rate)
    chosen = video.choose(n, fps=fps, indices=indices, times=times, repeat=repeat)
    return video.read(chosen, size=size, max_pixels=max_pixels)


def _fit(size: tuple[int, int], short: int | None, pixels: int | None) -> tuple[int, int]:
    """Width and height to which frames are shrunk."""
    width, height = size
    for name, value in (("size", short), ("max_pixels", pixels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is an int >= 1, not {value!r}")
    scale = 1.0
    if short is not None:
        scale = min(scale, short / min(width, height))
    if pixels is not None:
        scale = min(scale, math.sqrt(pixels / (width * height)))
    if scale == 1.0:
        return size
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    if pixels is not None and fitted[0] * fitted[1] > pixels:  # by rounding up
        fitted = max(1, int(width * scale)), max(1, int(height * scale))
    return fitted


def _scaled(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    from PIL import Image

    # The same for both readers, whose own scalers differ.
    image: Any = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
