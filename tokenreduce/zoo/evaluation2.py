"""Accuracy of ``world-llava-2`` on generated questions of the second world, with and without reducers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce.patching import patched
from tokenreduce.zoo import weights
from tokenreduce.zoo.evaluation import Case, drawn
from tokenreduce.zoo.video_inputs import video_inputs
from tokenreduce.zoo.world2 import (
    IMAGE_TYPES,
    LETTERS,
    LONG,
    SPLITS,
    VIDEO_TYPES,
    Clip,
    Scene,
    Score,
    ask,
    clip,
    scene,
    score,
)  # fmt: skip
from tokenreduce.zoo.world2.questions import beside
from tokenreduce.zoo.world2_words import processor

__all__ = ["FRAMES", "LONGEST", "TYPES", "Case", "cases", "evaluate", "learned_types", "size_of"]

#: Frames of a clip: what the model is taught with.
FRAMES = 16
TYPES = (*IMAGE_TYPES, *VIDEO_TYPES)
#: Words of the longest answer, a description, with its end.
LONGEST = 64


def cases(split: str = "test", seed: int = 0, questions: int = 400, types: Collection[str] | None = None) -> list[Case]:
    """``questions`` questions, the types in turn (those about pictures and clips where none are named), each about a
    scene or a clip of :data:`FRAMES` frames of its own from ``split``.

    Raises ``ValueError`` for a split or a type that is not there and for fewer than one question.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if unknown := [t for t in types or () if t not in TYPES]:
        raise ValueError(f"unknown question type {', '.join(map(repr, unknown))}; choose from {', '.join(TYPES)}")
    if questions < 1 or (types is not None and not types):
        raise ValueError(f"questions is 1 or more and types are not empty, not {questions} and {types}")
    chosen = [t for t in TYPES if types is None or t in types]

    def about(name: str, at: int) -> Scene | Clip:
        return clip(at, frames=FRAMES) if name in VIDEO_TYPES else scene(at, document=1.0 if name == "cell" else 0.4)

    return drawn(questions, chosen, SPLITS[split], seed, about, lambda name, made, at: ask(made, at, 1, name)[0])


def learned_types(among: Sequence[str] = IMAGE_TYPES, folder: Path = weights.FOLDER) -> tuple[str, ...]:
    """Those of ``among`` that the ``world-llava-2`` in ``folder`` has learned, as its card says; all without a card,
    and where it has learned none."""
    if "world-llava-2" not in weights.stored(folder):
        return tuple(among)
    said = str(weights.read_card("world-llava-2", folder).get("learned", ""))
    return tuple(t for t in among if t in said.split(", ")) or tuple(among)


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
    """Share of right answers, word for word: ``accuracy`` over all questions, ``image`` and ``video`` over theirs, and
    every type by its name.

    Of types with several words also ``<type>_elements`` and ``<type>_words`` (:func:`tokenreduce.zoo.world2.score`),
    and ``read_<pixels>`` by the height of the letters. ``vlm`` is what :func:`tokenreduce.zoo.load` gave for
    "world-llava-2", or its model: patched with ``reducers``, asked with greedy ``generate``, and unpatched. The same
    arguments ask the same questions.
    """
    model = vlm if isinstance(vlm, nn.Module) else vlm.model
    reading = getattr(vlm, "processor", None) or processor()
    asked = cases(split, seed, questions, types)
    groups: dict[tuple[bool, bool, int], list[Case]] = {}
    for case in asked:  # of one length, so that there is no padding
        groups.setdefault((case.type in VIDEO_TYPES, case.type in LONG, len(case.text.split())), []).append(case)
    found: dict[str, list[Score]] = {}
    with patched(model, *reducers) if reducers else nullcontext():
        for (video, long, _), group in groups.items():
            size = max(1, batch // 4) if video else batch
            for start in range(0, len(group), size):
                some = group[start : start + size]
                for case, said in zip(some, _answers(model, reading, some, LONGEST if long else 6), strict=True):
                    result = score(said, case.answer, case.type)
                    found.setdefault(case.type, []).append(result)
                    if case.type == "read":
                        found.setdefault(f"read_{size_of(case)}", []).append(result)
    exact = {name: _mean([s.exact for s in scores]) for name, scores in found.items()}
    out = {"accuracy": _mean([s.exact for t in TYPES for s in found.get(t, ())])}
    for kind, types_ in (("image", IMAGE_TYPES), ("video", VIDEO_TYPES)):
        if scores := [s.exact for t in types_ for s in found.get(t, ())]:
            out[kind] = _mean(scores)
    out.update({t: exact[t] for t in TYPES if t in exact})
    for name in ("read", "where_read", "read_at", *LONG):
        if name in found:
            out[f"{name}_elements"] = _mean([s.elements for s in found[name]])
            out[f"{name}_words"] = _mean([s.words for s in found[name]])
    return {**out, **{key: exact[key] for size in LETTERS if (key := f"read_{size}") in exact}}


def _answers(model: Any, reading: Any, some: Sequence[Case], tokens: int) -> list[str]:
    from PIL import Image

    if isinstance(some[0].about, Clip):
        inputs = video_inputs(model, [c.about.frames for c in some], [c.text for c in some], processor=reading)
        return _said(model, reading, inputs, tokens)
    images = [Image.fromarray(c.about.image) for c in some]
    made = reading(images=images, text=[f"<image> {c.text}" for c in some], return_tensors="pt")
    return _said(model, reading, {k: v.to(model.device) for k, v in made.items()}, tokens)


def _said(model: Any, reading: Any, inputs: Mapping[str, Any], tokens: int) -> list[str]:
    new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said: list[str] = reading.tokenizer.batch_decode(new, skip_special_tokens=True)
    return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
