"""Accuracy of ``world-llava-2`` on generated questions of the second world, with and without reducers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce.patching import patched
from tokenreduce.zoo import weights
from tokenreduce.zoo.evaluation import Case, drawn
from tokenreduce.zoo.world2 import IMAGE_TYPES, LETTERS, LONG, SPLITS, Score, ask, scene, score
from tokenreduce.zoo.world2.questions import beside
from tokenreduce.zoo.world2_words import processor

__all__ = ["LONGEST", "Case", "cases", "evaluate", "learned_types", "size_of"]

#: Words of the longest answer, a description, with its end.
LONGEST = 64


def cases(split: str = "test", seed: int = 0, questions: int = 400, types: Collection[str] | None = None) -> list[Case]:
    """``questions`` questions about pictures, the types in turn, each about a scene of its own from ``split``.

    Raises ``ValueError`` for a split or a type that is not there and for fewer than one question.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if unknown := [t for t in types or () if t not in IMAGE_TYPES]:
        raise ValueError(f"unknown question type {', '.join(map(repr, unknown))}; choose from {', '.join(IMAGE_TYPES)}")
    if questions < 1 or (types is not None and not types):
        raise ValueError(f"questions is 1 or more and types are not empty, not {questions} and {types}")
    chosen = [t for t in IMAGE_TYPES if types is None or t in types]
    return drawn(
        questions, chosen, SPLITS[split], seed,
        lambda name, at: scene(at, document=1.0 if name == "cell" else 0.4),
        lambda name, made, at: ask(made, at, 1, name)[0],
    )  # fmt: skip


def learned_types(folder: Path = weights.FOLDER) -> tuple[str, ...]:
    """The question types that the ``world-llava-2`` in ``folder`` has learned, as its card says; all without a card."""
    if "world-llava-2" not in weights.stored(folder):
        return IMAGE_TYPES
    said = str(weights.read_card("world-llava-2", folder).get("learned", ""))
    return tuple(t for t in IMAGE_TYPES if t in said.split(", ")) or IMAGE_TYPES


def size_of(case: Case) -> int | None:
    """Height in pixels of the letters that a question about a sign asks for; None for other questions."""
    last = case.text.split()[-1]
    if case.type in ("read", "letter"):
        return next(s.size for s in case.about.signs if s.colour == last)
    if case.type == "where_read":
        sign = beside(case.about, next(t for t in case.about.objects if t.kind == last))
        return None if sign is None else sign.size
    return None


@torch.no_grad()
def evaluate(
    vlm: Any,
    *reducers: Any,
    split: str = "test",
    seed: int = 0,
    questions: int = 400,
    types: Collection[str] | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Share of right answers: ``accuracy`` over all questions, word for word, and every type by its name.

    Of types with several words also ``<type>_elements`` and ``<type>_words`` (:func:`tokenreduce.zoo.world2.score`),
    and ``read_<pixels>`` by the height of the letters. ``vlm`` is what :func:`tokenreduce.zoo.load` gave for
    "world-llava-2", or its model: patched with ``reducers``, asked with greedy ``generate``, and unpatched. The same
    arguments ask the same questions.
    """
    model = vlm if isinstance(vlm, nn.Module) else vlm.model
    reading = getattr(vlm, "processor", None) or processor()
    asked = cases(split, seed, questions, types)
    groups: dict[tuple[bool, int], list[Case]] = {}
    for case in asked:  # of one length, so that there is no padding
        groups.setdefault((case.type in LONG, len(case.text.split())), []).append(case)
    found: dict[str, list[Score]] = {}
    with patched(model, *reducers) if reducers else nullcontext():
        for (long, _), group in groups.items():
            for start in range(0, len(group), batch):
                some = group[start : start + batch]
                for case, said in zip(some, _answers(model, reading, some, LONGEST if long else 6), strict=True):
                    result = score(said, case.answer, case.type)
                    found.setdefault(case.type, []).append(result)
                    if case.type == "read":
                        found.setdefault(f"read_{size_of(case)}", []).append(result)
    exact = {name: _mean([s.exact for s in scores]) for name, scores in found.items()}
    out = {"accuracy": _mean([s.exact for t in IMAGE_TYPES for s in found.get(t, ())])}
    out.update({t: exact[t] for t in IMAGE_TYPES if t in exact})
    for name in ("read", "where_read", *LONG):
        if name in found:
            out[f"{name}_elements"] = _mean([s.elements for s in found[name]])
            out[f"{name}_words"] = _mean([s.words for s in found[name]])
    return {**out, **{key: exact[key] for size in LETTERS if (key := f"read_{size}") in exact}}


def _answers(model: Any, reading: Any, some: Sequence[Case], tokens: int) -> list[str]:
    from PIL import Image

    images = [Image.fromarray(c.about.image) for c in some]
    made = reading(images=images, text=[f"<image> {c.text}" for c in some], return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in made.items()}
    new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said: list[str] = reading.tokenizer.batch_decode(new, skip_special_tokens=True)
    return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
