"""Questions about images with their answers: of the generated world, or from a JSONL file of one's own."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SECOND", "Item", "load_questions", "matches", "normalised"]

#: What ``limit=None`` means for the generated world, which has no end.
WORLD_QUESTIONS = 2400
#: Questions about the second world: of the types that its model has learned, and of all.
SECOND = ("world2", "world2-all")


@dataclass(frozen=True)
class Item:
    """A question. ``image`` is a PIL image or a file, ``answers`` are all that count as right."""

    id: int
    text: str
    answers: tuple[str, ...]
    type: str | None
    image: Any = field(repr=False)

    def open(self) -> Any:
        """The PIL image in RGB. Raises ``OSError`` or ``ValueError`` when the file is missing, broken or unusable."""
        from tokenreduce.common.images import PictureError, as_rgb, open_picture

        if not isinstance(self.image, Path):
            return as_rgb(self.image)
        try:
            return open_picture(self.image)
        except FileNotFoundError:
            raise FileNotFoundError("there is no such file") from None
        except PictureError as error:  # the path stands beside the reason
            raise ValueError(error.reason) from error


def load_questions(data: str, split: str = "test", limit: int | None = None, seed: int = 0) -> list[Item]:
    """The questions of ``data``: ``world``, ``world2`` or ``world2-all`` (generated from the seeds of ``split``, types
    in turn) or a JSONL file with lines ``{"image": path, "question": ..., "answer": ..., "type": ...}``. Of the second
    world ``world2`` asks the types that ``world-llava-2`` has learned, ``world2-all`` every one.

    Paths are relative to the file; ``answer`` may list several that count; ``type`` may be left out. ``limit``
    questions are drawn by ``seed``; without a limit the file is taken whole, and a world gives 2,400.

    Raises ``ValueError`` for other data, an unknown split and a line that is no question, ``FileNotFoundError`` for a
    file that is not there.
    """
    if data == "world":
        return _world(split, WORLD_QUESTIONS if limit is None else limit, seed)
    if data in SECOND:
        return _world2(split, WORLD_QUESTIONS if limit is None else limit, seed, data)
    if not data.endswith((".jsonl", ".json")):
        raise ValueError(f"questions are world, world2, world2-all or a JSONL file (questions.jsonl), not {data!r}")
    items = _read(Path(data).expanduser())
    if limit is not None and limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return items


def _world(split: str, questions: int, seed: int) -> list[Item]:
    from PIL import Image

    from tokenreduce.zoo.evaluation import KINDS_OF_TYPES, cases

    types = (*KINDS_OF_TYPES["image"], *KINDS_OF_TYPES["two_hop"])
    asked: Sequence[Any] = cases(split, seed, questions, types)
    return [Item(i, c.text, (c.answer,), c.type, Image.fromarray(c.about.image)) for i, c in enumerate(asked)]


def _world2(split: str, questions: int, seed: int, data: str) -> list[Item]:
    from PIL import Image

    from tokenreduce.zoo.evaluation2 import cases, learned_types
    from tokenreduce.zoo.world2 import IMAGE_TYPES

    asked = cases(split, seed, questions, learned_types() if data == SECOND[0] else IMAGE_TYPES)
    return [Item(i, c.text, (c.answer,), c.type, Image.fromarray(c.about.image)) for i, c in enumerate(asked)]


def _read(path: Path) -> list[Item]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a JSONL file with image, question and answer per line")
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            made = json.loads(line)
            answer = made["answer"]
            answers = tuple(str(a) for a in answer) if isinstance(answer, list) else (str(answer),)
            image, text, kind = Path(str(made["image"])), str(made["question"]), made.get("type")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"line {number} of {path} is no question ({type(error).__name__}: {error}); write "
                '{"image": "photo.jpg", "question": "...", "answer": "...", "type": "..."}'
            ) from error
        if not answers or not text.strip():
            raise ValueError(f"line {number} of {path} has an empty {'question' if answers else 'answer'}")
        items.append(Item(number, text, answers, None if kind is None else str(kind), path.parent / image))
    if not items:
        raise ValueError(f"{path} holds no question")
    return items


def normalised(text: str) -> str:
    """``text`` as answers are compared: lower case, without punctuation at the ends of words and articles.

    >>> normalised("The red cup."), normalised("A.")
    ('red cup', 'a')
    """
    words = [w for w in (w.strip(string.punctuation) for w in text.lower().split()) if w]
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)


def matches(answer: str, right: Sequence[str]) -> bool:
    """Whether ``answer`` is one of ``right`` after :func:`normalised`; where that is empty, as they stand."""
    said, stands = normalised(answer), answer.strip()
    return any(said == normalised(r) if said else stands == r.strip() for r in right)
