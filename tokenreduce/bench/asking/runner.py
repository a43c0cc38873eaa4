"""Asks one model all questions of a source, patched or not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.bench.asking.log import Part
from tokenreduce.bench.asking.source import Batch, Opened, Source, reason_of
from tokenreduce.bench.questions import Item
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.common.words import counted
from tokenreduce.measure.generation import greedy
from tokenreduce.measure.question import Question
from tokenreduce.patching import twin

__all__ = ["CACHE", "Answers", "Runner", "quiet"]

#: Prepared inputs up to this many bytes stay in memory, so that a sweep prepares them once.
CACHE = 1 << 30


class Answers(NamedTuple):
    """``said`` and ``right`` by the id of the question; ``broken`` counts outputs that are not finite."""

    said: dict[int, str]
    right: dict[int, bool]
    broken: int

    def accuracies(self, items: Sequence[Item]) -> dict[str, float]:
        """``accuracy`` and, with question types, ``accuracy_<type>``, each with its standard error."""
        kinds: dict[str, list[bool]] = {}
        for item in items:
            if item.id in self.right and item.type is not None:
                kinds.setdefault(f"accuracy_{item.type}", []).append(self.right[item.id])
        out: dict[str, float] = {}
        for key, right in {"accuracy": list(self.right.values()), **kinds}.items():
            share = sum(right) / len(right)
            out[key], out[f"{key}_stderr"] = share, math.sqrt(share * (1 - share) / len(right))
        return out


@dataclass
class Runner:
    """``batch`` questions of ``source`` per forward of ``loaded``; answers that are texts have ``max_new_tokens``.

    ``alone`` says that the processor cannot make batches, ``notes`` what a report should say about that; ``kept`` are
    batches by the group they are of, as many as fit into memory. ``stock`` shares the weights and is never patched.
    """

    loaded: LoadedVlm
    source: Source
    batch: int
    max_new_tokens: int
    alone: bool = False
    notes: list[str] = field(default_factory=list)
    kept: dict[int, list[Batch]] = field(default_factory=dict, repr=False)
    _size: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.asker = self.source.asker(self.loaded)
        self.stock: Any = twin(self.loaded.model)
        tokenizer = self.loaded.processor.tokenizer
        if tokenizer.pad_token is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def items(self) -> list[Item]:
        return self.source.items

    @cached_property
    def groups(self) -> list[list[Item]]:
        """Questions that go through the model together; a part of the work is one of these."""
        return list(self.asker.groups(self.items, self.batch))

    def answer(self) -> Answers:
        """Answers of the model as it is now, patched or not. Raises ``ValueError`` where no question can be used."""
        return self.merged(self.part(unit) for unit in range(len(self.groups)))

    def part(self, unit: int) -> Part:
        """Answers to the questions of one group."""
        out = Part({}, {}, 0, {}, [])
        broken = 0
        for batch in self.batches(unit):
            said, finite = self._said(batch)
            for item, text, good in zip(batch.items, said, finite, strict=True):
                broken += not good
                out.said[item.id], out.right[item.id] = self.source.read(item, text) if good else ("", False)
        problems = self.source.problems
        found = {item.id: problems[item.id] for item in self.groups[unit] if item.id in problems}
        return out._replace(broken=broken, problems=found)

    def merged(self, parts: Iterable[Part]) -> Answers:
        """All answers, in the order of ``parts``. Raises ``ValueError`` where no question could be used."""
        out = Answers({}, {}, 0)
        broken = 0
        for part in parts:
            out.said.update(part.said)
            out.right.update(part.right)
            self.source.problems.update(part.problems)
            broken += part.broken
        if not out.said:
            problems, data = self.source.problems, self.source.data
            listed = [problems[key] for key in sorted(problems)][:5]
            first = "".join(f"\n  {p['path']}: {p['reason']}" for p in listed)
            raise ValueError(f"none of the {counted(len(self.items), 'question')} of {data} can be used:{first}")
        return out._replace(broken=broken)

    def probe(self, item: Item) -> Question:
        """One question alone, its inputs on the model's device."""
        question = self.asker.question(item, self.source.open(item))
        return replace(question, inputs=self._placed(question.inputs))

    def prefill(self, model: Any, question: Question) -> Any:
        """The cache behind the prompt, when the logits of the first new token are there, as ``generate`` does it."""
        with torch.inference_mode():
            inputs = question.inputs if question.remake is None else question.remake(model)
            return cache_of(model(**inputs, use_cache=True, logits_to_keep=1))

    def batches(self, unit: int) -> Iterator[Batch]:
        """The questions of a group that can be asked; the others become problems of the source."""
        if unit in self.kept:
            yield from self.kept[unit]
            return
        made: list[Batch] = []
        for batch in self._made(self.groups[unit]):
            made.append(batch)
            yield batch
        size = sum(_bytes(batch) for batch in made)
        if self._size + size <= CACHE:
            self._size += size
            self.kept[unit] = made

    def _said(self, batch: Batch) -> tuple[list[str], list[bool]]:
        """What the model says to each question of a batch, and whether its outputs are finite."""
        model: Any = self.loaded.model
        tokenizer = self.loaded.processor.tokenizer
        with torch.inference_mode():
            inputs = self._placed(batch.inputs) if batch.remake is None else batch.remake(model)
            if not self.asker.words:
                made = greedy(model, inputs, self.max_new_tokens)[:, inputs["input_ids"].shape[1] :]
                return tokenizer.batch_decode(made, skip_special_tokens=True), [True] * len(batch.items)
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids = logits.argmax(-1).tolist()  # rows of the table without a word have a number
            words = tokenizer.convert_ids_to_tokens(ids)
            return [w or f"<{i}>" for i, w in zip(ids, words, strict=True)], logits.isfinite().all(-1).tolist()

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs`` on the model's device, pixels in its dtype."""
        device, dtype = self.loaded.device, self.loaded.dtype
        return {
            k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }

    def _made(self, items: list[Item]) -> Iterator[Batch]:
        """Inputs of ``items``, in one batch where the processor can."""
        opened = []
        for item in items:
            try:
                opened.append((item, self.source.open(item)))
            except (OSError, ValueError) as error:
                self.source.problems[item.id] = reason_of(item, error)
        for part in self.asker.alike(opened):
            yield from [self.asker.together(part)] if self.asker.lone_batches else self._tried(part)

    def _tried(self, opened: list[Opened]) -> Iterator[Batch]:
        reason = ""
        if not self.alone and len(opened) > 1:
            try:
                yield self.asker.together(opened)
                return
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        broken = len(self.source.problems)
        for item, one in opened:
            try:
                question = self.asker.question(item, one)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                self.source.problems[item.id] = reason_of(item, error)
                continue
            yield Batch([item], question.inputs, question.remake)
        if reason and len(self.source.problems) == broken:  # no single question is to blame
            self.alone = True
            self.notes.append(f"questions are asked one at a time: the processor makes no batches of them ({reason})")


def _bytes(batch: Batch) -> int:
    return sum(v.numel() * v.element_size() for v in batch.inputs.values() if isinstance(v, Tensor))


class quiet(warnings.catch_warnings):  # noqa: N801 - used like a function
    """Warnings are silent inside: the notes were taken already."""

    def __enter__(self) -> Any:
        out = super().__enter__()
        warnings.simplefilter("ignore")
        return out
