"""The second world: more and smaller things, signs with texts, documents, clips with events, and long answers.

>>> from tokenreduce.zoo.world2 import SPLITS, ask, scene
>>> picture = scene(SPLITS["test"][0])
>>> picture.image.shape, picture.labels.kinds.shape
((224, 224, 3), (28, 28))
>>> len(ask(picture, seed=0, n=8))
8

As in the first world (:mod:`tokenreduce.zoo.world`), every scene, clip and list of questions is a function of its seed
alone, and the splits are the same ranges of seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tokenreduce.zoo.world.questions import Question
from tokenreduce.zoo.world2 import clip_questions, questions
from tokenreduce.zoo.world2.clip_questions import VIDEO_TYPES
from tokenreduce.zoo.world2.clips import Actor, Clip, clip
from tokenreduce.zoo.world2.questions import IMAGE_TYPES, LONG, READING, TWO_HOP
from tokenreduce.zoo.world2.scenes import Labels, Scene, Thing, scene
from tokenreduce.zoo.world2.scoring import Score, elements, score
from tokenreduce.zoo.world2.signs import LETTERS, Document, Sign, check_text
from tokenreduce.zoo.world2.vocabulary import CANVAS, CHARACTERS, COLOURS, KINDS, SPLITS, TEXTURES, WORDS

__all__ = [
    "CANVAS", "CHARACTERS", "COLOURS", "IMAGE_TYPES", "KINDS", "LETTERS", "LONG", "READING", "SPLITS", "TEXTURES",
    "TWO_HOP", "VIDEO_TYPES", "WORDS", "Actor", "Clip", "Document", "Labels", "Question", "Scene", "Score", "Sign",
    "Thing", "ask", "check_text", "clip", "elements", "scene", "score",
]  # fmt: skip


def ask(
    what: Scene | Clip, seed: int, n: int, types: str | Collection[str] | Mapping[str, float] | None = None
) -> list[Question]:
    """``n`` different questions about a scene (:mod:`~.questions`) or a clip (:mod:`~.clip_questions`), by ``seed``.

    ``types`` names the type or types to draw from, a mapping also their weights; types without a question for ``what``
    are passed over. Raises ``ValueError`` for an unknown type and when there are fewer than ``n`` different questions,
    so also for a single type that ``what`` lacks: ``cell`` without a document, ``read`` without a sign.
    """
    return (clip_questions if isinstance(what, Clip) else questions).ask(what, seed, n, types)  # type: ignore[arg-type]
