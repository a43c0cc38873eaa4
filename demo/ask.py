"""What the ask tab does: its examples, and one question answered whole and with each of several reductions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tokenreduce.bench.vlms import EMBEDDED as LANGUAGE
from tokenreduce.core.reducer import Reducer
from tokenreduce.demo.answers import NAMES, put
from tokenreduce.demo.uploads import image_from, is_video, video_from
from tokenreduce.measure.clip_form import USUAL, clip_form
from tokenreduce.measure.generation import Comparison, compare_several
from tokenreduce.measure.kept import kept_views, sheet
from tokenreduce.measure.question import Question, unknown_words
from tokenreduce.video.sampling import uniform
from tokenreduce.zoo.evaluation2 import FRAMES as TAUGHT
from tokenreduce.zoo.examples import Example, clip2_examples, clip_examples, scene2_examples, scene_examples
from tokenreduce.zoo.photographs import photographs

__all__ = [
    "EMBEDDED", "STAGES", "START", "Answered", "about_words", "answer", "examples_of", "frames_from", "longest_of",
    "missing",
]  # fmt: skip

STAGES = {
    "encoder": "Inside the vision encoder",
    "projector": "Before the language model",
    "language": "Inside the language model",
}
#: What the two columns start with: method by stage, and the share of tokens that it keeps in percent.
START = {"A": {"projector": ("visionzip", 20)}, "B": {"language": ("fastv", 20)}}
#: The models that come with the library, small enough to follow every change at once.
EMBEDDED = tuple(LANGUAGE)
#: Longest answer that a model starts with, in tokens; of others :data:`LONGEST`.
LONGEST_OF = {"world-llava": 1, "world-llava-2": 12}
LONGEST = 24
#: What may be asked about a photograph; nobody wrote down what is right.
PHOTO_QUESTIONS = tuple((text, "") for text in ("What is in this picture?", "Describe this picture in one sentence."))
#: Frames that are read of an upload: as many as any model is shown, since it stays when another is chosen.
FRAMES, ROUNDS = max(USUAL, TAUGHT), 3


def missing() -> str:
    """What the tab says where there is no model that answers questions."""
    return (
        "The embedded `world-llava` answers questions about pictures, but its weights are not in this installation "
        "(`tokenreduce train world-llava --help` makes them). To ask a model of your own, start the page with "
        "`tokenreduce demo --model FOLDER_OR_HUB_ID`."
    )


def examples_of(model: str) -> tuple[Example, ...]:
    """What a model can be asked about: its own world, or photographs and clips for a model of the user's own."""
    if model == "world-llava":
        return (*scene_examples(6)[:4], *clip_examples(2))
    if model == "world-llava-2":
        return (*scene2_examples(6)[:5], *clip2_examples(1))
    photos = tuple(Example(e.truth, e.image, (), PHOTO_QUESTIONS) for e in photographs(4))
    return (*(photos or scene_examples(6)[:4]), *clip_examples(2))


def longest_of(model: str) -> int:
    """Longest answer that a model starts with, in tokens."""
    return LONGEST_OF.get(model, LONGEST)


def about_words(model: str) -> str:
    """What stands below the question: which words a model knows, "" for one of the user's own."""
    return f"{model} knows the words of its small world only, see the suggestions" if model in EMBEDDED else ""


def frames_from(path: str | Path) -> tuple[list[Image.Image], bool]:
    """What is read of an upload, and whether it is a video. Raises ``ValueError`` for what cannot be read."""
    if is_video(path):
        return video_from(path, FRAMES)[0], True
    return [image_from(path)], False


@dataclass(frozen=True)
class Answered:
    """One question: a comparison and a picture of the tokens that are left at the end for every reduction; ``notes``
    are about the question."""

    question: str
    results: tuple[Comparison, ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

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
    several: Sequence[Sequence[Reducer | str]],
    longest: int,
) -> Answered:
    """Ask ``loaded``, a copy that may be patched, about ``frames``: unreduced and with each of ``several``. Of a
    ``video`` it is shown as many as its form has (:func:`~tokenreduce.measure.clip_form.clip_form`), and a note says
    where that is not all of them, or where there are fewer than an embedded model was taught with.

    ``longest`` bounds the answer, in tokens. Raises what :func:`~tokenreduce.demo.answers.put` and
    :func:`~tokenreduce.measure.generation.compare_several` raise, and ``ValueError`` for words that an embedded model
    does not know; of another model that is a note.
    """
    shown, notes = _shown(loaded, frames) if video else (frames, ())
    asked, where = put(loaded, shown, video, question)
    notes = (*_strange(loaded, asked), *notes)
    made = compare_several(loaded.model, loaded.processor, asked, several, max_new_tokens=longest, rounds=ROUNDS)
    drawn = tuple(sheet([view for view, _ in kept_views(r, where)]) for r in made)
    return Answered(" ".join(question.split()), tuple(made), drawn, notes)


def _shown(loaded: Any, frames: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[str, ...]]:
    """Of the frames of a video those that a model sees, and what there is to say of their number."""
    form, name = clip_form(loaded.processor), loaded.name
    shown = [frames[i] for i in uniform(len(frames), form.frames)] if frames else []
    if len(shown) < len(frames):
        return shown, (f"{name} is shown {len(shown)} of the {len(frames)} frames",)
    if form.kind == "own" and len(shown) < form.frames:
        return shown, (f"{name} was taught with clips of {form.frames} frames, this one is shown as {len(shown)}",)
    return shown, ()


def _strange(loaded: Any, asked: Question) -> tuple[str, ...]:
    strange = unknown_words(loaded.processor.tokenizer, asked)
    if not strange:
        return ()
    told = f"{loaded.name} does not know: {', '.join(strange)}"
    if loaded.name not in EMBEDDED:
        return (f"{told}; its answer may be a guess",)
    from tokenreduce.zoo import world, world2

    known = [*(world if loaded.name == "world-llava" else world2).WORDS]
    near = {w: difflib.get_close_matches(w.lower(), known, 2, 0.6) for w in strange}
    meant = "; ".join(f"for {w} perhaps {' or '.join(n)}" for w, n in near.items() if n)
    raise ValueError(
        f"{told}{f' ({meant})' if meant else ''}. Take one of the suggestions, or words of its small world only: "
        f"{', '.join(known)}"
    )
