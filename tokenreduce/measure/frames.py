"""A question about the frames of a video, as a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokenreduce.measure.generation import visual_columns
from tokenreduce.measure.kept import Place, frame_places, places
from tokenreduce.measure.question import Question, ask

__all__ = ["ask_frames"]


def ask_frames(loaded: Any, frames: Sequence[Image.Image], prompt: str) -> tuple[Question, list[Place]]:
    """``prompt`` about ``frames``, and where their tokens lie.

    ``loaded`` has a ``name``, ``model`` and ``processor`` (:func:`tokenreduce.bench.vlms.load_vlm`). ``world-llava``
    gets its own form, frames pooled to 49 tokens each; every other model gets one image per frame, in order. Raises
    ``ValueError`` for an empty prompt, no frame and whatever the processor refuses.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something about the video")
    if not frames:
        raise ValueError("no frame is given; give at least one")
    if loaded.name != "world-llava":
        question = ask(loaded.processor, frames, prompt)
        return question, places(loaded.model, loaded.processor, question)
    from tokenreduce.zoo.video_inputs import video_inputs

    clip = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])

    def remake(model: Any) -> dict[str, Any]:
        return video_inputs(model, [clip], [prompt], processor=loaded.processor)

    question = Question(prompt, tuple(frames), prompt, remake(loaded.model), remake)
    columns = visual_columns(loaded.model, question).nonzero().flatten()
    side = round((len(columns) / len(frames)) ** 0.5)
    return question, frame_places(loaded.processor, question, (side, side), columns)
