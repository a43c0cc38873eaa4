"""Which frames of a clip a benchmark shows to a model, and reading them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.bench.clips import ClipItem
from tokenreduce.bench.frame_cache import FrameCache

__all__ = ["SAMPLINGS", "Sampler", "Shown", "thumbnails"]

SAMPLINGS = ("uniform", "diverse")
#: Frames that ``fps`` gives at most, spread evenly, and candidates that "diverse" looks at.
MOST = 256
#: Pixels on a side of what "diverse" compares.
THUMBNAIL = 16


@dataclass(frozen=True, eq=False)
class Shown:
    """Frames (T,H,W,3) uint8 of a clip, and the seconds (T,) at which each is shown; ``kept`` says that nothing was
    decoded for them."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    kept: bool = False


@dataclass(frozen=True)
class Sampler:
    """Frames of a clip, within its span if it has one.

    Args:
        frames: that many, fewer only where a clip has fewer.
        fps: frames per second in place of ``frames``, at most :data:`MOST`.
        sampling: "uniform", spread evenly with the first and the last one; or "diverse": of up to :data:`MOST` evenly
            spread candidates those that differ most by their :func:`thumbnails`
            (:func:`tokenreduce.video.sampling.max_min`), which needs no encoder.
        cache: where frames of files are kept between runs; without one they are decoded each time.

    Raises ``ValueError`` for other values, both or neither of ``frames`` and ``fps``, and "diverse" with ``fps``.
    """

    frames: int | None = 8
    fps: float | None = None
    sampling: str = "uniform"
    cache: FrameCache | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.fps is None):
            raise ValueError("give one of frames and fps")
        if self.frames is not None and (isinstance(self.frames, bool) or self.frames < 1):
            raise ValueError(f"frames is an int >= 1, not {self.frames!r}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is a number > 0, not {self.fps!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is one of {', '.join(SAMPLINGS)}, not {self.sampling!r}")
        if self.fps is not None and self.sampling != "uniform":
            raise ValueError(f"sampling={self.sampling!r} takes a number of frames, not fps")

    def read(self, item: ClipItem) -> Shown:
        """Raises ``VideoError`` (a ``ValueError``) for a file that is missing or cannot be read."""
        if isinstance(item.image, np.ndarray):
            clip, times = item.image, np.arange(len(item.image), dtype=np.float64)
            at = self._choose(times, float(len(clip)), item.span, lambda some: clip[some])
            return Shown(clip[at], times[at])
        path = Path(item.image)
        rate = (item.rate or self.fps) if path.is_dir() else None

        def decode() -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
            from tokenreduce.video.reading import open_video

            video = open_video(path, rate=rate)
            at = self._choose(
                video.times, video.duration, item.span, lambda some: video.read(some, size=2 * THUMBNAIL).frames
            )
            found = video.read(at)
            return found.frames, found.times

        if self.cache is None:
            return Shown(*decode())
        how: dict[str, Any] = {
            "frames": self.frames, "fps": self.fps, "sampling": self.sampling, "span": item.span, "rate": rate,
        }  # fmt: skip
        return Shown(*self.cache.read(path, how, decode))

    def _choose(
        self,
        times: NDArray[np.float64],
        duration: float,
        span: tuple[float, float] | None,
        look: Callable[[list[int]], NDArray[np.uint8]],
    ) -> list[int]:
        from tokenreduce.video.sampling import at_times, by_fps, max_min, uniform

        inside = list(range(len(times)))
        if span is not None:
            inside = [i for i in inside if span[0] <= times[i] <= span[1]] or at_times(times, [span[0]])
        if self.fps is not None:
            end = duration if span is None else None
            return [inside[i] for i in by_fps(times[inside], self.fps, end, most=MOST)]
        assert self.frames is not None
        if self.sampling == "uniform" or self.frames >= len(inside):
            return [inside[i] for i in uniform(len(inside), self.frames)]
        candidates = [inside[i] for i in uniform(len(inside), max(MOST, self.frames))]
        features = thumbnails(look(candidates))
        if len(features) < len(candidates):  # some cannot be decoded: what is there cannot be told apart
            return [inside[i] for i in uniform(len(inside), self.frames)]
        return [candidates[i] for i in max_min(features, self.frames)]


def thumbnails(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(T, 16*16*3) of frames (T,H,W,3): shrunk pictures less their mean, so that cosine compares what they show."""
    from PIL import Image

    small = [
        np.asarray(Image.fromarray(np.ascontiguousarray(f)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
        for f in frames
    ]
    flat = np.stack(small).reshape(len(small), -1).astype(np.float32)
    out: NDArray[np.float32] = flat - flat.mean(1, keepdims=True)
    return out
