"""A question about the frames of a video, as a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokenreduce.common.images import as_rgb
from tokenreduce.measure.clip_form import clip_form
from tokenreduce.measure.generation import visual_columns
from tokenreduce.measure.kept import Place, frame_places, places
from tokenreduce.measure.question import Question, ask, prompt_text

__all__ = ["ask_frames", "film_metadata", "film_places", "frames_question", "own_form"]


def ask_frames(
    loaded: Any, frames: Sequence[Image.Image], prompt: str, *, times: Sequence[float] | None = None
) -> tuple[Question, list[Place]]:
    """:func:`frames_question`, and where the tokens of the frames lie; no places where that cannot be told."""
    question = frames_question(loaded, frames, prompt, times=times)
    return question, film_places(loaded, question)


def frames_question(
    loaded: Any, frames: Sequence[Image.Image], prompt: str, *, times: Sequence[float] | None = None
) -> Question:
    """``prompt`` about ``frames``, shown at ``times`` (seconds; one per second by default).

    ``loaded`` has a ``model`` and a ``processor`` (:func:`tokenreduce.bench.vlms.load_vlm`); the form is that of
    :func:`~tokenreduce.measure.clip_form.clip_form`. ``world-llava`` and ``world-llava-2`` get their own, frames pooled
    to 49 and 196 tokens each; a processor that takes videos gets one, with these frames and times; every other model
    gets one image per frame, in order. Raises ``ValueError`` for an empty prompt, no frame, another number of times
    than frames, and whatever the processor refuses.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something about the video")
    if not len(frames):
        raise ValueError("no frame is given; give at least one")
    if times is not None and len(times) != len(frames):
        raise ValueError(f"{len(times)} times for {len(frames)} frames; give one for each")
    kind = clip_form(loaded.processor).kind
    if kind == "own":
        return own_form(loaded, frames, prompt)
    if kind == "video":
        return _as_video(loaded.processor, frames, prompt, times)
    return ask(loaded.processor, frames, prompt)


def own_form(loaded: Any, frames: Sequence[Image.Image], prompt: str) -> Question:
    """:func:`frames_question` in the form of the embedded models: "frame <image> frame <image> ... question"."""
    from tokenreduce.zoo.video_inputs import clip_pixels, video_inputs

    clip = np.stack([np.asarray(as_rgb(frame)) for frame in frames])
    pixels = clip_pixels([clip], loaded.processor)

    def remake(model: Any) -> dict[str, Any]:
        return video_inputs(model, [clip], [prompt], processor=loaded.processor, pixels=pixels)

    return Question(prompt, tuple(frames), prompt, remake(loaded.model), remake)


def _as_video(processor: Any, frames: Sequence[Image.Image], prompt: str, times: Sequence[float] | None) -> Question:
    pictures = tuple(map(as_rgb, frames))
    clip = np.stack([np.asarray(p) for p in pictures])
    text = prompt_text(processor, 1, prompt, "video")
    settings: dict[str, Any] = {}
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and text.startswith(bos):  # else it would be there twice
        settings["add_special_tokens"] = False
    try:
        made = dict(
            processor(
                videos=[clip], text=[text], return_tensors="pt", do_sample_frames=False,
                video_metadata=[film_metadata(len(clip), times)], **settings,
            )
        )  # fmt: skip
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{type(processor).__name__} cannot read the prompt with its video: {error}") from error
    made.pop("labels", None)
    return Question(prompt, pictures, text, made)


def film_metadata(count: int, times: Sequence[float] | None) -> Any:
    """True times as frame numbers of a film with a frame every millisecond: processors divide numbers by a rate."""
    from transformers.video_utils import VideoMetadata

    shown = [float(i) for i in range(count)] if times is None else [float(t) for t in times]
    step = (shown[-1] - shown[0]) / (count - 1) if count > 1 else 1.0
    total = max(round(1000 * step * count), count)
    at = [round(1000 * t) for t in shown]
    return VideoMetadata(total_num_frames=total, fps=1000.0, frames_indices=at, duration=total / 1000)


def film_places(loaded: Any, question: Question) -> list[Place]:
    """Where the tokens of every frame lie. Where a model joins frames to one temporal position, that has the place of
    its first frame. Empty where it cannot be told."""
    if question.remake is None and "pixel_values_videos" not in question.inputs:
        return places(loaded.model, loaded.processor, question)
    columns = visual_columns(loaded.model, question).nonzero().flatten()
    count, grid = len(question.images), None
    film = question.inputs.get("video_grid_thw")
    if film is not None:
        merge = loaded.model.config.vision_config.spatial_merge_size
        count, high, wide = (int(v) for v in film[0])
        grid = high // merge, wide // merge
    each = len(columns) // count
    if grid is None:
        side = round(each**0.5)
        grid = side, side
    size = grid[0] * grid[1]
    if len(columns) < count * size:
        return []
    if question.remake is not None:
        return frame_places(loaded.processor, question, grid, columns)
    step = max(len(question.images) // count, 1)
    cropped = bool(getattr(loaded.processor.video_processor, "do_center_crop", False))
    shown = [_middle(p) if cropped else p for p in question.images[::step][:count]]
    return [Place(columns[i * size : (i + 1) * size], grid, picture) for i, picture in enumerate(shown)]


def _middle(picture: Image.Image) -> Image.Image:
    """The square that is left of a picture whose short side is scaled to a size and whose middle is cut out."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
