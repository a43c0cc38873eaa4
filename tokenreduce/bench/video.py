"""The video language model task: the columns of the image one, and what reading and encoding the frames takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tokenreduce.adapters.language.projector.marks import TOWER
from tokenreduce.bench.clip_frames import Sampler, Shown
from tokenreduce.bench.clips import LAYOUTS, LETTERS, ClipItem, chosen, lettered, load_clips
from tokenreduce.bench.questions import Item, matches
from tokenreduce.bench.times import ITSELF, speed_keys
from tokenreduce.bench.tower_clock import tower_clock
from tokenreduce.bench.vision import _whole
from tokenreduce.bench.vlm import VlmTask, _Batch, _knows_the_world, _Ready
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import reducers_of
from tokenreduce.measure.frames import film_metadata, frames_question, own_form, takes_videos
from tokenreduce.measure.question import Question, prompt_text
from tokenreduce.measure.timing import Speedup
from tokenreduce.patching import describe

__all__ = ["FRAMES", "VideoTask"]

#: Frames of a clip where nothing is said.
FRAMES = 8
#: Clips of ``world-llava`` up to this many keep what the tower made of them, for methods that look at the same of it.
SHARED = 256


@dataclass
class VideoTask(VlmTask):
    """One video language model on questions about clips, measured row by row; see :class:`VlmTask`.

    Args:
        data, split, limit, seed, layout: see :func:`~tokenreduce.bench.clips.load_clips`.
        frames, fps, sampling: see :class:`~tokenreduce.bench.clip_frames.Sampler`; 8 frames where neither of the first
            two is given.

    A question with options is asked with a letter before each, and the letter of the answer counts, or its text.
    ``world-llava``, and any model whose tokenizer has every word of the world as one token, gets questions in its own
    form and answers with the likeliest word; a processor that takes videos gets videos with their true times; any other
    model gets one image per frame. Bad settings raise ``ValueError``.
    """

    limit: int | None = 120
    batch: int = 8
    layout: str = "auto"
    frames: int | None = None
    fps: float | None = None
    sampling: str = "uniform"

    name: ClassVar[str] = "video"
    films: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("uniform-frames", "random@projector", "pool", "pool-frames")
    well_known: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "projector": ("evs", "vidcom2", "dycoke", "prunevid", "fastvid", "holitom", "flashvid", "fastervlm"),
        "language": ("framefusion", "fastv"), "encoder": ("tome",),
    }  # fmt: skip
    probed: ClassVar[int] = 4

    _decoded: list[float] = field(default_factory=list, init=False, repr=False)
    _said: tuple[str, ...] = field(default=(), init=False, repr=False)
    _shared: list[Question] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if self.frames is None and self.fps is None:
            self.frames = FRAMES
        self._sampler = Sampler(self.frames, self.fps, self.sampling)

    def settings(self) -> dict[str, Any]:
        more = {key: getattr(self, key) for key in ("layout", "frames", "fps", "sampling")}
        return {**super().settings(), **more}

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row of :class:`VlmTask` and, of one clip: ``frames``, ``tokens_per_frame`` that enter the language model,
        ``decode_s`` to read the frames (None where they are generated), ``tower_s`` of the vision tower with its
        projector, and ``tower_speedup`` against the stock one."""
        row = super().measure(reducers)
        shown = statistics.fmean(len(q.images) for q in self._ready.probes)
        notes = row.pop("notes")
        return {
            **row,
            "frames": _whole(shown),
            "tokens_per_frame": row["visual_tokens"] / shown,
            "decode_s": statistics.median(self._decoded) if self._decoded else None,
            "notes": notes if reducers else [*self._said, *notes],
        }

    def spent(self, reducers: Sequence[Reducer]) -> float:
        """As :meth:`VlmTask.spent`; methods that look at the same of the tower share what it made of the probes."""
        ready = self._ready
        fresh = list(ready.probes)
        if not self._shared:
            self._shared = [q if q.remake is None else replace(q, remake=_Shared(q.remake)) for q in fresh]
        ready.probes = self._shared
        try:
            return super().spent(reducers)
        finally:
            ready.probes = fresh

    # -- questions -----------------------------------------------------------------------------------------------------
    def _asked(self) -> tuple[list[Item], dict[int, dict[str, str]]]:
        found = load_clips(self.data, self.layout, self.split, self.limit, self.seed)
        self._said = found.notes
        return list(found.items), dict(found.problems)

    def _one_word(self, loaded: LoadedVlm) -> bool:
        return _knows_the_world(loaded.processor.tokenizer)

    def _prompt(self, ready: _Ready, item: Item) -> str:
        assert isinstance(item, ClipItem)
        if ready.words:  # in the words of the world, without signs
            return item.text.lower().strip(" ?.!")
        if item.options:
            return lettered(item.text, item.options)
        return f"{item.text.capitalize()}? Answer with one word." if self.data == "world" else item.text

    def _open(self, ready: _Ready, item: Item) -> Shown:
        assert isinstance(item, ClipItem)
        began = time.perf_counter()
        shown = self._sampler.read(item)
        if isinstance(item.image, Path):
            self._decoded.append(time.perf_counter() - began)
        return shown

    def _question(self, ready: _Ready, item: Item, opened: Shown) -> Question:
        pictures, prompt = [Image.fromarray(f) for f in opened.frames], self._prompt(ready, item)
        if ready.words:
            return own_form(ready.loaded, pictures, prompt)
        return frames_question(ready.loaded, pictures, prompt, times=opened.times.tolist())

    def _groups(self, ready: _Ready) -> Iterable[list[Item]]:
        if not ready.words:
            yield from super()._groups(ready)
            return
        alike: dict[int, list[Item]] = {}  # prompts of one length, so that there is no padding
        for item in ready.items:
            alike.setdefault(len(self._prompt(ready, item).split()), []).append(item)
        for group in alike.values():
            yield from (group[i : i + self.batch] for i in range(0, len(group), self.batch))

    def _alike(self, opened: list[tuple[Item, Any]]) -> Iterable[list[tuple[Item, Any]]]:
        found: dict[int, list[tuple[Item, Any]]] = {}
        for item, shown in opened:
            found.setdefault(len(shown.frames), []).append((item, shown))
        return found.values()

    def _batch_of(self, ready: _Ready, opened: list[tuple[Item, Any]]) -> Iterator[_Batch]:
        if ready.words:  # one is a batch too, and shares
            yield self._together(ready, opened)
        else:
            yield from super()._batch_of(ready, opened)

    def _together(self, ready: _Ready, opened: Sequence[tuple[Item, Any]]) -> _Batch:
        items, clips = [item for item, _ in opened], [shown.frames for _, shown in opened]
        prompts = [self._prompt(ready, item) for item in items]
        processor = ready.loaded.processor
        if ready.words:
            return self._own(ready, items, clips, prompts)
        videos = takes_videos(processor)
        kind, count = ("video", 1) if videos else ("image", len(clips[0]))
        texts = [prompt_text(processor, count, prompt, kind) for prompt in prompts]
        settings: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        bos = processor.tokenizer.bos_token
        if bos and texts[0].startswith(bos):  # else it would be there twice
            settings["add_special_tokens"] = False
        if videos:
            settings["videos"] = clips
            settings["video_metadata"] = [film_metadata(len(s.times), s.times.tolist()) for _, s in opened]
            settings["do_sample_frames"] = False
        else:
            settings["images"] = [[Image.fromarray(f) for f in clip] for clip in clips]
        made = dict(processor(text=texts, **settings))
        made.pop("labels", None)
        return _Batch(items, made)

    def _own(self, ready: _Ready, items: list[Item], clips: list[Any], prompts: list[str]) -> _Batch:
        """The form of ``world-llava``, whose inputs hold features of the tower as it is patched."""
        from tokenreduce.zoo.video_inputs import clip_pixels, video_inputs

        processor = ready.loaded.processor
        pixels = clip_pixels(clips, processor)

        def remake(model: Any) -> dict[str, Any]:
            return video_inputs(model, clips, prompts, processor=processor, pixels=pixels)

        return _Batch(items, {"pixels": pixels}, _Shared(remake) if len(ready.items) <= SHARED else remake)

    def _read(self, item: Item, text: str) -> tuple[str, bool]:
        assert isinstance(item, ClipItem)
        if not item.options:
            return text, matches(text, item.answers)
        at = chosen(text, item.options)
        said = text if at is None else LETTERS[at]
        return said, at is not None and said in item.answers

    # -- time ----------------------------------------------------------------------------------------------------------
    def _clock(self, ready: _Ready, reduced: bool) -> dict[str, float | None]:
        device = ready.loaded.device

        def inner(model: Any) -> Any:
            return describe(model).language.inner

        with tower_clock(inner(ready.stock), device) as stock, tower_clock(inner(ready.loaded.model), device) as mine:
            out = super()._clock(ready, reduced)
        # One call in every round, behind that of the warm-up; the later ones are of another measurement.
        a, b = (seconds[1 : 1 + self.repeats] for seconds in (stock, mine))
        if len(a) != self.repeats or len(b) != self.repeats:
            return out
        speedup = Speedup.of(x / y for x, y in zip(a, b, strict=True)) if reduced else ITSELF
        return {**out, "tower_s": statistics.median(b), **speed_keys(speedup, "tower_speedup")}


@dataclass(frozen=True)
class _Shared:
    """``remake``, run once for all methods that look at the same of the tower's outputs."""

    remake: Callable[[Any], dict[str, Any]]
    kept: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, model: Any) -> dict[str, Any]:
        sees = _sees(model, reducers_of(model))
        if sees is None:
            return self.remake(model)
        if sees not in self.kept:
            self.kept[sees] = self.remake(model)
        return self.kept[sees]


def _sees(model: Any, reducers: Sequence[Reducer]) -> Any:
    """What these methods make of a tower's outputs and look at in it; None where they act inside it."""
    if any(r.stage == "encoder" for r in reducers):
        return None
    watched = any(r.stage == "projector" or r.looks() or {"films", *TOWER} & {*r.gathers()} for r in reducers)
    more = {"head", "pixels"} & {need for r in reducers for need in r.gathers()}
    if any("head" in r.wishes() for r in reducers) and "head" in describe(model).language.projector:
        more.add("head")
    return watched, frozenset(look for r in reducers for look in r.looks()), frozenset(more)
