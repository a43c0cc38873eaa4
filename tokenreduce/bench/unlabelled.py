"""Any model on pictures without labels: how often its answer stays that of the unreduced model, and what it saves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from tokenreduce.bench.asking.pictures import PictureAsker, Pictures
from tokenreduce.bench.asking.runner import Runner
from tokenreduce.bench.data import Images
from tokenreduce.bench.groups import MARKS
from tokenreduce.bench.hits import Answers
from tokenreduce.bench.models import Loaded
from tokenreduce.bench.questions import Item
from tokenreduce.bench.reading import Source
from tokenreduce.bench.vision import VisionTask
from tokenreduce.bench.vlm import VlmTask
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.common.words import counted
from tokenreduce.core.reducer import Reducer
from tokenreduce.patching import describe

__all__ = ["AskedPicturesTask", "Named", "PicturesTask"]

#: Keys of a row that mean nothing without labels.
LABELLED = ("top1", "top1_stderr", "top5", "accuracy", "accuracy_stderr", "found", MARKS)


class Named(NamedTuple):
    """A picture, and what reports call it."""

    name: str
    image: Image.Image


@dataclass
class PicturesTask(VisionTask):
    """One image model on ``pictures`` that nobody labelled: rows are ranked by ``agreement``.

    Args:
        given: the model, ready (:func:`~tokenreduce.bench.models.load_model`); it is patched between rows, so give a
            copy (:func:`tokenreduce.patching.twin`) of one that others use. ``model`` is its name.
        pictures: at least one; two of a model without classes.

    Of a classifier, and of a zero-shot model that knows its classes, ``agreement`` is the share of pictures with the
    unreduced model's best class. Of a model without classes it is the share whose nearest other picture (cosine of the
    features) is the unreduced model's. Rows have no accuracy. Raises ``ValueError`` for too few pictures.
    """

    given: Loaded | None = field(default=None, repr=False)
    pictures: Sequence[Named] = field(default=(), repr=False)

    @property
    def metric(self) -> str:
        return "agreement"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "data": data_of(self.pictures)}

    def load(self) -> None:
        if self._source is not None:
            return
        if self.given is None or not self.pictures:
            raise ValueError("give a loaded model and at least one picture")
        loaded = self.given
        describe(loaded.model)
        if loaded.kind == "zero-shot" and loaded.classifier is None:
            loaded = replace(loaded, kind="features")
        several = loaded.kind == "features"
        if several and len(self.pictures) < 2:
            raise ValueError(f"{loaded.name} has no classes, its pictures are compared; give at least 2 pictures")
        n = len(self.pictures)
        # Without classes every picture is one of its own: the nearest neighbour's is then its number.
        labels = list(range(n)) if several else [0] * n
        names = tuple(p.name for p in self.pictures)
        data = data_of(self.pictures)
        self._source = loaded, Images(data, _Given(), list(self.pictures), labels, names, loaded.transform)

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """:meth:`VisionTask.measure` without what needs labels; ``agreement`` comes with its standard error."""
        return _unlabelled(super().measure(reducers), "images")

    def _notes(self, ready: Any, reducers: tuple[Reducer, ...], answers: Answers, said: list[str]) -> list[str]:
        notes = list(dict.fromkeys(said))
        if answers.broken:
            notes.append(f"{counted(answers.broken, 'picture')} gave NaN or infinite outputs; that is no agreement")
        if reducers:
            return notes
        kind = "nearest other picture" if ready.loaded.kind == "features" else "best class"
        n = counted(len(answers.y), "picture")
        return [*ready.loaded.notes, f"agreement: the share of {n} with the unreduced model's {kind}", *notes]


@dataclass
class AskedPicturesTask(VlmTask):
    """One language model on one ``question`` about each of ``pictures`` that nobody answered: rows are ranked by
    ``agreement``, the share of pictures with the unreduced model's answer, letter by letter.

    Args:
        given: the model with its processor, ready; patched between rows, see :class:`PicturesTask`.

    Rows have no accuracy. Raises ``ValueError`` for an empty question and without pictures.
    """

    given: LoadedVlm | None = field(default=None, repr=False)
    pictures: Sequence[Named] = field(default=(), repr=False)
    question: str = "What is in this picture?"

    metric: ClassVar[str] = "agreement"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "data": data_of(self.pictures), "question": self.question}

    def source(self) -> Pictures:
        return _Asked(self.pictures, self.question)

    def load(self) -> None:
        if self._loaded is not None:
            return
        if self.given is None or not self.pictures:
            raise ValueError("give a loaded model and at least one picture")
        if not self.question.strip():
            raise ValueError("the question is empty; ask something about the pictures")
        if describe(self.given.model).language is None:
            raise TypeError(f"{self.given.name} has no language model with visual tokens that an adapter knows")
        self._loaded = Runner(self.given, self.source(), self.batch, self.max_new_tokens)

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """:meth:`QuestionTask.measure` without what needs right answers."""
        return _unlabelled(super().measure(reducers), "questions")

    def _notes(self, reducers: tuple[Reducer, ...], answers: Any, said: list[str]) -> list[str]:
        notes = super()._notes(reducers, answers, said)
        told = f"agreement: the share of {counted(len(answers.said), 'picture')} with the unreduced model's answer"
        return notes if reducers else [told, *notes]


class _Given(Source):
    """Pictures that are open already."""

    def open(self, item: Named) -> Image.Image:
        return item.image

    def where(self, item: Named) -> str:
        return item.name


class _Asked(Pictures):
    """One question about every picture."""

    def __init__(self, pictures: Sequence[Named], question: str) -> None:
        self.data = data_of(pictures)
        text = " ".join(question.split())
        self.items = [Item(i, text, (), None, p.image) for i, p in enumerate(pictures)]
        self.problems: dict[int, dict[str, str]] = {}

    def read(self, item: Item, text: str) -> tuple[str, bool]:
        return text, False  # nobody knows what is right

    def graded(self, said: Mapping[int, str]) -> dict[str, float]:
        return {}

    def asker(self, loaded: LoadedVlm) -> PictureAsker:
        # The first embedded model knows no chat form, and one word is all that it was trained to say.
        return PictureAsker(loaded, loaded.name == "world-llava")


def data_of(pictures: Sequence[Named]) -> str:
    """What a run calls ``pictures``: how many, and which."""
    made = hashlib.sha256()
    for picture in pictures:
        made.update(f"{picture.image.size}{picture.image.mode}".encode() + picture.image.tobytes())
    return f"{counted(len(pictures), 'picture')} ({made.hexdigest()[:8]})"


def _unlabelled(row: dict[str, Any], count: str) -> dict[str, Any]:
    share, n = row["agreement"], row[count]
    error = math.sqrt(share * (1 - share) / n)
    return {**{k: v for k, v in row.items() if k not in LABELLED}, "agreement_stderr": error}
