"""What the tab "Your model" does: a sweep of any model on pictures that nobody labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenreduce.bench.task import Task
from tokenreduce.bench.unlabelled import AskedPicturesTask, Named, PicturesTask
from tokenreduce.demo.ask import longest_of
from tokenreduce.demo.common import literal, short
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import image_from
from tokenreduce.patching import twin
from tokenreduce.zoo.examples import Example, digit_examples, scene2_examples, scene_examples
from tokenreduce.zoo.photographs import FIX, photographs

__all__ = [
    "COMMAND", "MOST", "about", "examples_of", "lead", "models_of", "named", "pictures_from", "question_of", "task_for"
]  # fmt: skip

COMMAND = "tokenreduce demo --model TIMM_NAME_FOLDER_OR_HUB_ID"
#: Pictures that a sweep takes at most.
MOST = 24
BATCH, REPEATS = 8, 3
#: What embedded models are asked; others :data:`QUESTION`.
QUESTIONS = {"world-llava": "how many things are there", "world-llava-2": "what thing is at the top left"}
QUESTION = "What is in this picture?"


def models_of(store: Store) -> list[str]:
    """What can be swept, the user's own model first."""
    there = [*store.images, *store.languages]
    return sorted(there, key=lambda name: name != store.own)


def lead(store: Store) -> str:
    """The line above the tab, as Markdown: which command brings a model here, or which one was brought."""
    if store.own is None:
        return f"Your model stands here after `{COMMAND}`. Until then, try one of those that come with the library."
    return (
        f"**{literal(short(store.own))}**: how often its answer stays the same with fewer tokens, and what that saves."
    )


def examples_of(store: Store, model: str) -> tuple[Example, ...]:
    """Pictures to begin with: photographs, or, for a model that comes with the library, what it was trained to see."""
    if model == "digits-vit":
        return digit_examples(12)
    if model in ("world-vit-2", "world-llava-2"):
        return scene2_examples(12)
    if model != store.own:
        return scene_examples(12)
    return photographs()


def named(examples: Sequence[Example]) -> list[Named]:
    """Examples as a sweep takes them."""
    return [Named(e.truth, e.image) for e in examples]


def pictures_from(paths: Sequence[Path]) -> list[Named]:
    """Uploads as a sweep takes them. Raises ``ValueError`` that names the first that cannot be read and says what to
    do, also for more than :data:`MOST`."""
    if len(paths) > MOST:
        raise ValueError(f"{len(paths)} pictures were given; at most {MOST} are taken, choose fewer")
    try:
        return [Named(path.name, image_from(path)) for path in paths]
    except ValueError as error:
        raise ValueError(f"{error}. Or leave it out; the pictures before are still there") from error


def about(pictures: Sequence[Named], uploaded: bool) -> str:
    """What the pictures are, and what to do where there is none."""
    if not pictures:
        return f"Upload some pictures, or have photographs here: {FIX}"
    return f"{len(pictures)} pictures of yours" if uploaded else "Pictures to begin with; upload your own"


def question_of(model: str) -> str:
    """What a language model is asked about every picture, to begin with."""
    return QUESTIONS.get(model, QUESTION)


def task_for(store: Store, model: str, pictures: Sequence[Named], question: str) -> Task:
    """The sweep of ``model`` on ``pictures``; copies of it are patched. Raises ``ValueError`` for a model that is not
    on the page and without pictures, and what loading a model raises."""
    if not pictures:
        raise ValueError("there are no pictures yet; upload some")
    common: dict[str, Any] = {"model": short(model), "pictures": pictures, "batch": BATCH, "repeats": REPEATS}
    common["device"] = store.device
    if model in store.languages:
        if not question.strip():
            raise ValueError("the question is empty; ask something about the pictures")
        return AskedPicturesTask(given=store.copy(model), question=question, max_new_tokens=longest_of(model), **common)
    loaded = store.image(model)
    return PicturesTask(given=replace(loaded, model=twin(loaded.model)), classes=None, **common)
