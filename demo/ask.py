"""What the ask tab does: its examples, and one question answered whole and with each of several reductions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tokenreduce.core.reducer import Reducer
from tokenreduce.demo.answers import NAMES, put
from tokenreduce.demo.uploads import image_from, is_video, video_from
from tokenreduce.measure.generation import Comparison, compare_several
from tokenreduce.measure.kept import kept_views, sheet
from tokenreduce.zoo import weights
from tokenreduce.zoo.examples import Example, clip_examples, scene2_examples, scene_examples

__all__ = ["EMBEDDED", "STAGES", "START", "Answered", "answer", "examples_of", "frames_from", "missing"]

STAGES = {
    "encoder": "Inside the vision encoder",
    "projector": "Before the language model",
    "language": "Inside the language model",
}
#: What the two columns start with: method by stage, and the share of tokens that it keeps in percent.
START = {"A": {"projector": ("visionzip", 20)}, "B": {"language": ("fastv", 20)}}
#: The model that comes with the library, small enough to follow every change at once.
EMBEDDED = "world-llava"
FRAMES, ROUNDS = 8, 3


def missing() -> str:
    """What the tab says where there is no model that answers questions."""
    return (
        "The embedded `world-llava` answers questions about pictures, but its weights are not in this installation "
        "(`tokenreduce train world-llava --help` makes them). To ask a model of your own, start the page with "
        "`tokenreduce demo --model FOLDER_OR_HUB_ID`."
    )


def examples_of() -> tuple[Example, ...]:
    """Scenes, behind them clips and, where there is a model for it, scenes of the second world."""
    second = scene2_examples(3) if "world-llava-2" in weights.learned() else ()
    return (*scene_examples(6)[:4], *clip_examples(2), *second)


def frames_from(path: str | Path) -> tuple[list[Image.Image], bool]:
    """What the model sees of an upload, and whether it is a video. Raises ``ValueError`` for what cannot be read."""
    if is_video(path):
        return video_from(path, FRAMES)[0], True
    return [image_from(path)], False


@dataclass(frozen=True)
class Answered:
    """One question: a comparison and a picture of the tokens that are left at the end for every reduction."""

    question: str
    results: tuple[Comparison, ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)

    @property
    def layers(self) -> dict[str, Sequence[int]]:
        """Visual tokens in every layer: unreduced, then of each reduction."""
        reduced = {f"{n}: {r.spec}": r.reduced.layers for n, r in zip(NAMES, self.results, strict=True)}
        return {"unreduced": self.results[0].stock.layers, **reduced}


def answer(
    loaded: Any,
    frames: Sequence[Image.Image],
    video: bool,
    question: str,
    several: Sequence[tuple[Reducer, ...]],
    longest: int,
) -> Answered:
    """Ask ``loaded``, a copy that may be patched, about ``frames``: unreduced and with each of ``several``.

    ``longest`` bounds the answer, in tokens. Raises what :func:`~tokenreduce.demo.answers.put` and
    :func:`~tokenreduce.measure.generation.compare_several` raise.
    """
    asked, where = put(loaded, frames, video, question)
    made = compare_several(loaded.model, loaded.processor, asked, several, max_new_tokens=longest, rounds=ROUNDS)
    drawn = tuple(sheet([view for view, _ in kept_views(r, where)]) for r in made)
    return Answered(" ".join(question.split()), tuple(made), drawn)
