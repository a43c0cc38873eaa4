"""The video language model task: the columns of the image one, and what reading and encoding the frames takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenreduce.bench.asking.films import Films
from tokenreduce.bench.asking.meter import Clock, tower_too
from tokenreduce.bench.asking.task import QuestionTask
from tokenreduce.bench.clip_frames import Sampler
from tokenreduce.bench.clips import LAYOUTS
from tokenreduce.bench.frame_cache import GIGABYTES, FrameCache
from tokenreduce.bench.questions import SECOND

__all__ = ["FRAMES", "VideoTask"]

#: Frames of a clip where nothing is said, and of clips of the second world.
FRAMES, SECOND_FRAMES = 8, 16


@dataclass
class VideoTask(QuestionTask):
    """One video language model on questions about clips, measured row by row; see :class:`QuestionTask`.

    Args:
        data, split, limit, seed, layout: see :func:`~tokenreduce.bench.clips.load_clips`.
        frames, fps, sampling: see :class:`~tokenreduce.bench.clip_frames.Sampler`; 8 frames where neither of the first
            two is given, 16 of clips of the second world.
        frame_cache: gigabytes of decoded frames that are kept on the disk between runs; 0 keeps none.

    A question with options is asked with a letter before each, and the letter of the answer counts, or its text.
    In which form a model is asked says :func:`~tokenreduce.measure.clip_form.clip_form`: ``world-llava``,
    ``world-llava-2``, and any model whose tokenizer has the words of the world and few others, get questions in their
    own form and answer with the likeliest words; a processor that takes videos gets videos with their true times; any
    other model gets one image per frame. A row also has ``frames``, ``tokens_per_frame`` that enter the language model,
    ``decode_s`` (None where frames are generated or kept), ``tower_s`` of the vision tower with its projector, and
    ``tower_speedup`` against the stock one, all of one clip. Bad settings raise ``ValueError``.
    """

    limit: int | None = 120
    batch: int = 8
    layout: str = "auto"
    frames: int | None = None
    fps: float | None = None
    sampling: str = "uniform"
    frame_cache: float = GIGABYTES
    against: str = "tokens"  # the tower sees every frame whole: methods behind it cannot come down to a share of FLOPs

    name: ClassVar[str] = "video"
    films: ClassVar[bool] = True
    clock: ClassVar[Clock] = staticmethod(tower_too)
    baselines: ClassVar[tuple[str, ...]] = ("uniform-frames", "random@projector", "pool", "pool-frames")
    well_known: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "projector": ("evs", "vidcom2", "dycoke", "prunevid", "fastvid", "holitom", "flashvid", "fastervlm"),
        "language": ("framefusion", "fastv"), "encoder": ("tome",),
    }  # fmt: skip
    probed: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if self.frames is None and self.fps is None:
            self.frames = SECOND_FRAMES if self.data in SECOND else FRAMES
        self._sampler = Sampler(self.frames, self.fps, self.sampling, FrameCache.usual(self.frame_cache))

    def source(self) -> Films:
        return Films(self.data, self.layout, self.split, self.limit, self.seed, self._sampler)

    def settings(self) -> dict[str, Any]:
        more = {key: getattr(self, key) for key in ("layout", "frames", "fps", "sampling")}
        return {**super().settings(), **more}
