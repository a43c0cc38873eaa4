"""A small world of coloured things: seeded scenes and clips with labels per patch, and questions about them.

>>> from tokenreduce.zoo.world import SPLITS, ask, scene
>>> picture = scene(SPLITS["test"][0])
>>> picture.image.shape, picture.kinds.shape
((112, 112, 3), (14, 14))
>>> len(ask(picture, seed=0, n=8))
8

Every scene, clip and list of questions is a function of its seed alone. The shipped models were trained on seeds of
``SPLITS["train"]``; anyone can evaluate a model on ``SPLITS["test"]`` or on seeds outside every split.
"""

from __future__ import annotations

from tokenreduce.zoo.world.clips import Clip, Mover, clip
from tokenreduce.zoo.world.questions import IMAGE_TYPES, MIX, TWO_HOP, TYPES, VIDEO_TYPES, Question, ask
from tokenreduce.zoo.world.scenes import Scene, Thing, scene
from tokenreduce.zoo.world.vocabulary import CANVAS, COLOURS, KINDS, MOTIONS, NUMBERS, PATCH, SPLITS, TEXTURES, WORDS

__all__ = [
    "CANVAS", "COLOURS", "IMAGE_TYPES", "KINDS", "MIX", "MOTIONS", "NUMBERS", "PATCH", "SPLITS", "TEXTURES",
    "TWO_HOP", "TYPES", "VIDEO_TYPES", "WORDS", "Clip", "Mover", "Question", "Scene", "Thing", "ask", "clip", "scene",
]  # fmt: skip
