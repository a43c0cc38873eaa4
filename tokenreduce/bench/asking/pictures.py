"""Questions about images, and how an image language model is asked them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenreduce.bench.asking.source import Batch, Opened, processed, runs
from tokenreduce.bench.questions import SECOND, Item, load_questions, matches
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.common.images import as_rgb
from tokenreduce.measure.clip_form import knows_the_world
from tokenreduce.measure.question import Question, ask, prompt_text

__all__ = ["PictureAsker", "Pictures"]


class Pictures:
    """The :class:`~tokenreduce.bench.asking.source.Source` of
    :func:`~tokenreduce.bench.questions.load_questions`, which takes the same arguments and raises the same."""

    notes: tuple[str, ...] = ()

    def __init__(self, data: str, split: str, limit: int | None, seed: int) -> None:
        self.data = data
        self.items = load_questions(data, split, limit, seed)
        self.problems: dict[int, dict[str, str]] = {}

    def open(self, item: Item) -> Any:
        return item.open()

    def read(self, item: Item, text: str) -> tuple[str, bool]:
        return text, matches(text, item.answers)

    def graded(self, said: Mapping[int, str]) -> dict[str, float]:
        """Of the second world: ``elements``, the share of what long answers should tell that they tell, by type."""
        if self.data not in SECOND:
            return {}
        from tokenreduce.zoo.world2 import LONG, READING, score

        found: dict[str, list[float]] = {}
        for item in self.items:
            if item.id in said and item.type in (*LONG, *READING):
                found.setdefault(item.type, []).append(score(said[item.id], item.answers[0], item.type).elements)
        return {f"elements_{name}": sum(shares) / len(shares) for name, shares in found.items()}

    def asker(self, loaded: LoadedVlm) -> PictureAsker:
        return PictureAsker(loaded, self.data == "world")

    def columns(self, probes: Sequence[Question], row: dict[str, Any]) -> dict[str, Any]:
        return {}


class PictureAsker:
    """``world``: questions are about the generated world, and get its one-word answers where the tokenizer has them."""

    lone_batches = False

    def __init__(self, loaded: LoadedVlm, world: bool) -> None:
        self.loaded, self.world = loaded, world
        self.words = world and knows_the_world(loaded.processor.tokenizer)

    def groups(self, items: Sequence[Item], size: int) -> Iterable[list[Item]]:
        return runs(items, size)

    def alike(self, opened: list[Opened]) -> Iterable[list[Opened]]:
        return [opened] if opened else []

    def question(self, item: Item, opened: Any) -> Question:
        return ask(self.loaded.processor, [opened], self._prompt(item))

    def together(self, opened: Sequence[Opened]) -> Batch:
        processor = self.loaded.processor
        texts = [prompt_text(processor, 1, self._prompt(item)) for item, _ in opened]
        made = processed(processor, texts, images=[[as_rgb(picture)] for _, picture in opened])
        return Batch([item for item, _ in opened], made)

    def _prompt(self, item: Item) -> str:
        if self.words:
            return f"{self.loaded.processor.image_token} {item.text}"
        return f"{item.text.capitalize()}? Answer with one word." if self.world else item.text
