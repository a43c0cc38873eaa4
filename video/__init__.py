"""What uses time: reading, sampling, temporal methods, streaming.

Importing this package loads neither decord nor PyAV; they are loaded when a file is read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenreduce.video.clip_memory import ClipMemory
    from tokenreduce.video.errors import VideoError
    from tokenreduce.video.memory import Recalled, StreamingMemory
    from tokenreduce.video.pyramid_memory import PyramidMemory
    from tokenreduce.video.reading import Frames, Video, open_video, read_frames
    from tokenreduce.video.sampling import aks, by_fps, max_min, pairs, uniform
    from tokenreduce.video.selecting import Selection, select_frames

__all__ = [
    "ClipMemory", "Frames", "PyramidMemory", "Recalled", "Selection", "StreamingMemory", "Video", "VideoError", "aks",
    "by_fps", "max_min", "open_video", "pairs", "read_frames", "select_frames", "uniform",
]  # fmt: skip

_HOMES = {
    "clip_memory": ("ClipMemory",),
    "errors": ("VideoError",),
    "memory": ("Recalled", "StreamingMemory"),
    "pyramid_memory": ("PyramidMemory",),
    "reading": ("Frames", "Video", "open_video", "read_frames"),
    "sampling": ("aks", "by_fps", "max_min", "pairs", "uniform"),
    "selecting": ("Selection", "select_frames"),
}


#: What must be loaded before: the kinds of memory that a file may hold.
_BEFORE = {"StreamingMemory": ("clip_memory", "pyramid_memory")}


def __getattr__(name: str) -> Any:
    for kind in _BEFORE.get(name, ()):
        importlib.import_module(f"tokenreduce.video.{kind}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tokenreduce.video.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
