"""Accuracy of ``world-llava`` on generated questions, with and without reducers, by question type."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tokenreduce.patching import patched
from tokenreduce.zoo.video_inputs import video_inputs
from tokenreduce.zoo.world.clips import Clip, clip
from tokenreduce.zoo.world.questions import IMAGE_TYPES, TWO_HOP, VIDEO_TYPES, ask
from tokenreduce.zoo.world.scenes import Scene, scene
from tokenreduce.zoo.world.vocabulary import SPLITS
from tokenreduce.zoo.world_words import IDS, processor

__all__ = ["KINDS_OF_TYPES", "Case", "cases", "drawn", "evaluate"]

#: Types by what they are about. Those of clips that pictures have too are called "video_colour_of", ...
KINDS_OF_TYPES = {
    "image": IMAGE_TYPES,
    "two_hop": TWO_HOP,
    "video": tuple(f"video_{t}" if t in IMAGE_TYPES else t for t in VIDEO_TYPES),
}


@dataclass(frozen=True)
class Case:
    """One question: about what scene or clip, its words, the answer and the name of its type."""

    about: Any
    text: str
    answer: str
    type: str


def cases(split: str = "test", seed: int = 0, questions: int = 400, types: Collection[str] | None = None) -> list[Case]:
    """``questions`` questions, the types in turn, each about a scene or clip of its own from ``split``.

    Raises ``ValueError`` for a split or a type that is not there and for fewer than one question.
    """
    known = tuple(t for group in KINDS_OF_TYPES.values() for t in group)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if unknown := [t for t in types or () if t not in known]:
        raise ValueError(f"unknown question type {', '.join(map(repr, unknown))}; choose from {', '.join(known)}")
    if questions < 1 or (types is not None and not types):
        raise ValueError(f"questions is 1 or more and types are not empty, not {questions} and {types}")
    chosen = [t for t in known if types is None or t in types]

    def about(name: str, at: int) -> Scene | Clip:
        if name in KINDS_OF_TYPES["video"]:
            return clip(at)
        return scene(at, copy_colour=0.45 if name in TWO_HOP else 0.25)

    def asked(name: str, made: Any, at: int) -> Any:
        return ask(made, at, 1, [name.removeprefix("video_")])[0]

    return drawn(questions, chosen, SPLITS[split], seed, about, asked)


def drawn(
    count: int, types: Sequence[str], span: range, seed: int, about: Callable[[str, int], Any],
    asked: Callable[[str, Any, int], Any],
) -> list[Case]:  # fmt: skip
    """``count`` cases, ``types`` in turn: what a question of a type is ``about``, drawn from a seed in ``span``, and
    what is ``asked`` of it; where it lacks such a question, the next seed is taken."""
    rng = np.random.default_rng((7, seed))
    out: list[Case] = []
    while len(out) < count:
        name = types[len(out) % len(types)]
        while True:  # most scenes have a question of every type
            at = int(rng.integers(span.start, span.stop))
            made = about(name, at)
            try:
                question = asked(name, made, at)
            except ValueError:
                continue
            break
        out.append(Case(made, question.text, question.answer, name))
    return out


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
    """Share of right answers: ``accuracy`` over all questions, ``image``, ``two_hop`` and ``video`` over theirs, and
    every question type by its name.

    ``vlm`` is what :func:`tokenreduce.zoo.load` gave for "world-llava", or its model. It is patched with ``reducers``
    (as :func:`tokenreduce.patch` takes them), evaluated as a user would call it, and unpatched. An answer is right when
    the likeliest word behind the question is it. The same arguments ask the same questions.
    """
    model = vlm if isinstance(vlm, nn.Module) else vlm.model
    reading = getattr(vlm, "processor", None) or processor()
    asked = cases(split, seed, questions, types)
    groups: dict[tuple[bool, int], list[Case]] = {}
    for case in asked:  # of one length, so that there is no padding
        groups.setdefault((isinstance(case.about, Clip), len(case.text.split())), []).append(case)
    right: dict[str, list[bool]] = {}
    with patched(model, *reducers) if reducers else nullcontext():
        for (video, _), group in groups.items():
            size = max(1, batch // 4) if video else batch
            for start in range(0, len(group), size):
                some = group[start : start + size]
                logits = model(**_inputs(model, reading, some), logits_to_keep=1).logits[:, -1]
                for case, guess in zip(some, logits.argmax(-1).tolist(), strict=True):
                    right.setdefault(case.type, []).append(guess == IDS[case.answer])
    out = {"accuracy": _mean([ok for oks in right.values() for ok in oks])}
    for name, members in KINDS_OF_TYPES.items():
        if oks := [ok for t in members for ok in right.get(t, [])]:
            out[name] = _mean(oks)
    return {**out, **{t: _mean(right[t]) for group in KINDS_OF_TYPES.values() for t in group if t in right}}


def _inputs(model: Any, reading: Any, some: Sequence[Case]) -> dict[str, Any]:
    if isinstance(some[0].about, Clip):
        return video_inputs(model, [c.about.frames for c in some], [c.text for c in some], processor=reading)
    from PIL import Image

    images = [Image.fromarray(c.about.image) for c in some]
    made = reading(images=images, text=[f"<image> {c.text}" for c in some], return_tensors="pt")
    return {k: v.to(model.device) for k, v in made.items()}


def _mean(oks: Sequence[bool]) -> float:
    return sum(oks) / len(oks)
