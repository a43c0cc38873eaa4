"""Questions about clips, and how a video language model is asked them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenreduce.bench.asking.shared import Shared
from tokenreduce.bench.asking.source import Batch, Opened, processed, runs
from tokenreduce.bench.clip_frames import Sampler, Shown
from tokenreduce.bench.clips import LETTERS, WORLDS, ClipItem, chosen, lettered, load_clips
from tokenreduce.bench.questions import Item, matches
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.common.words import whole
from tokenreduce.measure.clip_form import clip_form
from tokenreduce.measure.frames import film_metadata, frames_question
from tokenreduce.measure.question import Question, prompt_text

__all__ = ["SHARED", "FilmAsker", "Films"]

#: Clips of an embedded model up to this many keep what the tower made of them, for methods that look at the same of it.
SHARED = 256


class Films:
    """The :class:`~tokenreduce.bench.asking.source.Source` of :func:`~tokenreduce.bench.clips.load_clips`, which takes
    the same arguments and raises the same; ``sampler`` says which frames are shown."""

    def __init__(self, data: str, layout: str, split: str, limit: int | None, seed: int, sampler: Sampler) -> None:
        self.data, self.sampler = data, sampler
        found = load_clips(data, layout, split, limit, seed)
        self.items: list[Item] = list(found.items)
        self.problems = dict(found.problems)
        self._notes = tuple(found.notes)
        self._decoded: list[float] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the questions, and of frames that were kept."""
        cache, said = self.sampler.cache, list(self._notes)
        if cache is not None and cache.hits and not self._decoded:
            said.append("all frames came from the frame cache; nothing was decoded")
        elif cache is not None and cache.trouble:
            said.append(f"frames are not kept: {cache.trouble} ({cache.folder})")
        return tuple(said)

    def open(self, item: Item) -> Shown:
        assert isinstance(item, ClipItem)
        began = time.perf_counter()
        shown = self.sampler.read(item)
        if isinstance(item.image, Path) and not shown.kept:
            self._decoded.append(time.perf_counter() - began)
        return shown

    def read(self, item: Item, text: str) -> tuple[str, bool]:
        assert isinstance(item, ClipItem)
        if not item.options:
            return text, matches(text, item.answers)
        at = chosen(text, item.options)
        said = text if at is None else LETTERS[at]
        return said, at is not None and said in item.answers

    def graded(self, said: Mapping[int, str]) -> dict[str, float]:
        return {}

    def asker(self, loaded: LoadedVlm) -> FilmAsker:
        return FilmAsker(loaded, self.data in WORLDS, len(self.items) <= SHARED)

    def columns(self, probes: Sequence[Question], row: dict[str, Any]) -> dict[str, Any]:
        """``frames`` of a clip, ``tokens_per_frame`` that enter the language model, ``decode_s`` to read the frames
        (None where they are generated, or were kept from an earlier run)."""
        shown = statistics.fmean(len(q.images) for q in probes)
        return {
            "frames": whole(shown),
            "tokens_per_frame": row["visual_tokens"] / shown,
            "decode_s": statistics.median(self._decoded) if self._decoded else None,
        }


class FilmAsker:
    """``world``: clips are of a generated world; ``share``: methods that look at the same of the tower share what it
    made of a batch, where inputs hold that."""

    def __init__(self, loaded: LoadedVlm, world: bool, share: bool) -> None:
        self.loaded, self.world, self.share = loaded, world, share
        self.kind = clip_form(loaded.processor).kind
        self.words = self.kind == "own"  # in the words of the world
        self.lone_batches = self.words  # one is a batch too, and shares

    def groups(self, items: Sequence[Item], size: int) -> Iterable[list[Item]]:
        if not self.words:
            yield from runs(items, size)
            return
        alike: dict[int, list[Item]] = {}  # prompts of one length, so that there is no padding
        for item in items:
            alike.setdefault(len(self._prompt(item).split()), []).append(item)
        for group in alike.values():
            yield from runs(group, size)

    def alike(self, opened: list[Opened]) -> Iterable[list[Opened]]:
        found: dict[int, list[Opened]] = {}
        for item, shown in opened:
            found.setdefault(len(shown.frames), []).append((item, shown))
        return found.values()

    def question(self, item: Item, opened: Shown) -> Question:
        pictures, prompt = [Image.fromarray(f) for f in opened.frames], self._prompt(item)
        return frames_question(self.loaded, pictures, prompt, times=opened.times.tolist())

    def together(self, opened: Sequence[Opened]) -> Batch:
        items, clips = [item for item, _ in opened], [shown.frames for _, shown in opened]
        prompts = [self._prompt(item) for item in items]
        if self.words:
            return self._own(items, clips, prompts)
        processor = self.loaded.processor
        videos = self.kind == "video"
        kind, count = ("video", 1) if videos else ("image", len(clips[0]))
        texts = [prompt_text(processor, count, prompt, kind) for prompt in prompts]
        given: dict[str, Any] = {}
        if videos:
            given["videos"] = clips
            given["video_metadata"] = [film_metadata(len(s.times), s.times.tolist()) for _, s in opened]
            given["do_sample_frames"] = False
        else:
            given["images"] = [[Image.fromarray(f) for f in clip] for clip in clips]
        return Batch(items, processed(processor, texts, **given))

    def _own(self, items: list[Item], clips: list[Any], prompts: list[str]) -> Batch:
        """The form of the embedded models, whose inputs hold features of the tower as it is patched."""
        from tokenreduce.zoo.video_inputs import clip_pixels, video_inputs

        processor = self.loaded.processor
        pixels = clip_pixels(clips, processor)

        def remake(model: Any) -> dict[str, Any]:
            return video_inputs(model, clips, prompts, processor=processor, pixels=pixels)

        return Batch(items, {"pixels": pixels}, Shared(remake) if self.share else remake)

    def _prompt(self, item: Item) -> str:
        assert isinstance(item, ClipItem)
        if self.words:  # in the words of the world, without signs
            return item.text.lower().strip(" ?.!")
        if item.options:
            return lettered(item.text, item.options)
        return f"{item.text.capitalize()}? Answer with one word." if self.world else item.text
