"""Frames by decord 0.6, where it gives the right ones.

decord finds frames by timestamps that it reads from packets. Measured on files that count their frames, it silently
gives other frames for AVI with B-frames, for open GOPs (the default of HEVC encoders), for MPEG-TS and behind edit
lists, and fails or gives four channels for pictures that must be turned by a right angle. The index of the file tells
these beforehand (:attr:`tokenreduce.video.index.Index.doubts`); the rest shows in decord's own count and timestamps.
What is left: damage inside a packet that decord's decoder accepts in silence, where PyAV leaves the frame out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.video.errors import VideoError, need
from tokenreduce.video.index import Index, Way

__all__ = ["Decord", "Distrust"]

#: decord repeats the last good frame for one that it cannot decode; any such frame is an error instead.
NO_FAULTS = 1e-9


class Distrust(Exception):  # noqa: N818 -- says to use the other reader, no error of the file by itself
    """decord cannot be relied on for this file; the message says why."""


class Decord:
    """An open file. ``index`` is None where PyAV is not installed: then only decord's own word is there.

    Raises :class:`Distrust`.
    """

    def __init__(self, path: Path, index: Index | None) -> None:
        decord = need("decord")
        if index is not None and index.doubts:
            raise Distrust("; ".join(index.doubts))
        self.shared = decord.bridge.to_torch
        self.errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError)
        try:
            self.video: Any = decord.VideoReader(str(path), ctx=decord.cpu(0), fault_tol=NO_FAULTS)
            count = len(self.video)
            stamps = np.asarray(self.video.get_frame_timestamp(np.arange(count)), np.float64)
        except self.errors as error:
            raise Distrust(_short(error)) from error
        if index is None:
            if not np.isfinite(stamps).all() or np.abs(stamps).max() > 1e9 or (np.diff(stamps[:, 0]) <= 0).any():
                raise Distrust("its timestamps make no sense")
        elif count != index.count:
            raise Distrust(f"it counts {count} frames, the file holds {index.count}")
        # They are float32, and Matroska's are rounded to milliseconds.
        elif not (np.abs(stamps[:, 0] - stamps[0, 0] - index.times) <= 2e-3 + 1e-6 * index.times).all():
            raise Distrust("its timestamps are not those of the file")
        self.stamps = stamps

    def index(self) -> Index:
        """An index of what decord says about the file, for use without PyAV."""
        times, count = self.stamps[:, 0] - self.stamps[0, 0], len(self.stamps)
        height, width = self.frames([0]).shape[1:3]
        fps = float((count - 1) / times[-1]) if count > 1 and times[-1] > 0 else float(self.video.get_avg_fps())
        none: NDArray[np.int64] = np.zeros(0, np.int64)
        return Index(
            times, float(self.stamps[0, 0]), None, functools.partial(Way, none.reshape(0, 2), none, {}), width, height,
            0, fps, float(times[-1] + 1 / fps), "unknown", (),
            ("PyAV is not installed, so decord's frames and times could not be checked",),
        )  # fmt: skip

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(T,H,W,3) uint8. Raises :class:`Distrust` where decord fails on the way."""
        try:
            out = self.video.get_batch(list(indices))
        except (*self.errors, StopIteration) as error:
            raise Distrust(_short(error)) from error
        # A bridge to another library, once set, holds for the whole process. The memory is shared: what asnumpy() takes
        # to copy a short clip is as long as all checks of its file.
        frames = np.asarray(self.shared(out) if hasattr(out, "asnumpy") else out)
        if frames.shape[-1] != 3:
            raise Distrust(f"it gives frames of shape {frames.shape[1:]}")
        return frames

    def decode(self, wanted: Sequence[int], keep: Callable[[int, np.ndarray], None], chunk: int = 16) -> None:
        """Call ``keep(i, picture)`` for every frame of ``wanted``, holding ``chunk`` of them at a time."""
        for at in range(0, len(wanted), chunk):
            part = wanted[at : at + chunk]
            for i, picture in zip(part, self.frames(part), strict=True):
                keep(i, picture)


def open_alone(path: Path) -> tuple[Decord, Index]:
    """decord and its index without PyAV; raises :class:`VideoError`."""
    try:
        video = Decord(path, None)
        return video, video.index()
    except Distrust as doubt:
        step = "install PyAV, which reads more files: pip install 'tokenreduce[video]'"
        raise VideoError(path, f"decord cannot read it ({doubt})", step) from doubt


def _short(error: BaseException) -> str:
    """The line of decord's message that says something, without the place in its source."""
    line = str(error).strip().split("\n")[0].split("Check failed: ")[-1]
    return f"decord: {line.split('] ')[-1]}" if line else f"decord: {type(error).__name__}"
