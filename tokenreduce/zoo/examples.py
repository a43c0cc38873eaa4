"""A few held-out pictures and clips that the embedded models know, with what is true of them, for trying things out."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from PIL import Image

__all__ = ["Example", "clip2_examples", "clip_examples", "digit_examples", "scene2_examples", "scene_examples"]


@dataclass(frozen=True)
class Example:
    """``truth`` names what is seen; ``frames`` are those of a clip, whose middle one is ``image``; ``questions`` come
    with their answers."""

    truth: str
    image: Image.Image = field(repr=False)
    frames: tuple[Image.Image, ...] = field(default=(), repr=False)
    questions: tuple[tuple[str, str], ...] = ()


@functools.cache
def digit_examples(n: int = 8) -> tuple[Example, ...]:
    """The first handwritten digits of the test split, one of each class in turn, as the model sees them (28x28).

    Raises ``ImportError`` naming the extra where the digits are not installed.
    """
    from tokenreduce.zoo.digits import MEAN, STD, load_data

    x, y = load_data("test")
    chosen = [int((y == c).nonzero()[turn]) for turn in range(-(-n // 10)) for c in range(10)][:n]
    pixels = ((x[chosen, 0] * STD + MEAN) * 255).round().clamp(0, 255).byte().numpy()
    return tuple(Example(str(int(y[i])), Image.fromarray(p)) for i, p in zip(chosen, pixels, strict=True))


@functools.cache
def scene_examples(n: int = 8, objects: tuple[int, int] = (3, 6), questions: int = 6) -> tuple[Example, ...]:
    """The first scenes of the test split with their kinds and questions about them (112x112)."""
    from tokenreduce.zoo.world import SPLITS, scene

    first = SPLITS["test"].start
    made = []
    for seed in range(first, first + n):
        seen = scene(seed, objects=objects)
        truth = ", ".join(f"{t.colour} {t.kind}" for t in seen.objects)
        made.append(Example(truth, Image.fromarray(seen.image), (), _questions(seen, seed, questions)))
    return tuple(made)


@functools.cache
def scene2_examples(n: int = 6, questions: int = 6) -> tuple[Example, ...]:
    """The first scenes of the test split of the second world with what is there and questions (224x224)."""
    from tokenreduce.zoo.world2 import SPLITS, ask, scene

    first = SPLITS["test"].start
    made = []
    for seed in range(first, first + n):
        seen = scene(seed, objects=(3, 6))
        truth = ", ".join(
            [f"{t.colour} {t.kind}" for t in seen.objects] + [f"sign {s.text.upper()}" for s in seen.signs]
        )
        asked = {q.text: q.answer for q in [*ask(seen, seed, 1, "read"), *ask(seen, seed, questions - 1)]}
        made.append(Example(truth, Image.fromarray(seen.image), (), tuple(asked.items())))
    return tuple(made)


@functools.cache
def clip_examples(n: int = 4, questions: int = 6) -> tuple[Example, ...]:
    """The first clips of the test split with their things and questions about them (8 frames of 112x112)."""
    from tokenreduce.zoo.world import SPLITS, clip

    first = SPLITS["test"].start
    made = []
    for seed in range(first, first + n):
        seen = clip(seed)
        frames = tuple(Image.fromarray(f) for f in seen.frames)
        truth = ", ".join(f"{t.colour} {t.kind} ({t.motion})" for t in seen.objects)
        made.append(Example(truth, frames[len(frames) // 2], frames, _questions(seen, seed, questions)))
    return tuple(made)


@functools.cache
def clip2_examples(n: int = 2, questions: int = 6) -> tuple[Example, ...]:
    """The first clips of the test split of the second world with their things and texts, and questions of the types
    that ``world-llava-2`` has learned (16 frames of 224x224)."""
    from tokenreduce.zoo.evaluation2 import FRAMES, learned_types
    from tokenreduce.zoo.world2 import SPLITS, VIDEO_TYPES, ask, clip

    first = SPLITS["test"].start
    made = []
    for seed in range(first, first + n):
        seen = clip(seed, frames=FRAMES)
        frames = tuple(Image.fromarray(f) for f in seen.frames)
        truth = ", ".join(
            [f"{t.colour} {t.kind} ({t.motion})" for t in seen.objects] + [f"sign {t.upper()}" for _, t in seen.texts]
        )
        asked = {q.text: q.answer for q in ask(seen, seed, questions, learned_types(VIDEO_TYPES))}
        made.append(Example(truth, frames[len(frames) // 2], frames, tuple(asked.items())))
    return tuple(made)


def _questions(what: object, seed: int, n: int) -> tuple[tuple[str, str], ...]:
    from tokenreduce.zoo.world import ask

    out: dict[str, str] = {}
    for question in ask(what, seed, n):  # type: ignore[arg-type]
        out.setdefault(question.text, question.answer)
    return tuple(out.items())
