"""The pictures of the gallery: scenes and a clip of the first world's test split, and a question about each."""

from __future__ import annotations

from PIL import Image

from tokenreduce.zoo.examples import clip_examples, scene_examples

__all__ = ["QUESTIONS", "clip", "scenes"]

SCENES = 3
#: Which clip of the split: things come and go, on a ground that dropped tokens can be told from.
CLIP = 6


def scenes() -> tuple[Image.Image, ...]:
    """Three scenes of 112x112 pixels."""
    return tuple(example.image for example in scene_examples(SCENES))


def clip() -> tuple[Image.Image, ...]:
    """Eight frames of 112x112 pixels."""
    return clip_examples(CLIP + 1)[CLIP].frames


#: What is asked of every scene, and of the clip behind them.
QUESTIONS = (*(e.questions[0][0] for e in scene_examples(SCENES)), clip_examples(CLIP + 1)[CLIP].questions[0][0])
