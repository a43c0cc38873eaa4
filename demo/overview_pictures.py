"""Pictures that the first tab shows of every run: few held-out ones of the data that the run was measured on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokenreduce.bench.runs import Run
from tokenreduce.zoo.examples import digit_examples

__all__ = ["MOST", "Picture", "makes", "pictures_of", "the_picture"]

MOST = 6


@dataclass(frozen=True)
class Picture:
    """``number`` is that of ``tokenreduce scene --seed``; ``labels`` are what a classifier should name; ``questions``
    come with their answers."""

    number: int
    image: Image.Image = field(repr=False)
    truth: str
    labels: tuple[str, ...]
    questions: tuple[tuple[str, str], ...] = ()


def pictures_of(run: Run) -> tuple[Picture, ...]:
    """Pictures of a run's data, () for data that nothing is stored of."""
    return _pictures(str((run.info.get("settings") or {}).get("data")))


def the_picture(run: Run, number: int) -> Picture:
    """A picture by its number. Raises ``ValueError`` for another, which can only come from outside the page."""
    found = {p.number: p for p in pictures_of(run)}
    if number not in found:
        raise ValueError(f"there is no picture {number}; there are: {', '.join(map(str, found))}")
    return found[number]


def makes(run: Run, picture: Picture) -> str:
    """The command that draws a picture, "" where it is none of a world."""
    data = str((run.info.get("settings") or {}).get("data"))
    worlds = {"world": "", "world2": " --world 2"}
    return f"tokenreduce scene scene.png{worlds[data]} --seed {picture.number}" if data in worlds else ""


@functools.cache
def _pictures(data: str) -> tuple[Picture, ...]:
    if data == "digits":
        try:
            made = digit_examples(MOST)
        except ImportError:  # they come with an extra
            return ()
        return tuple(Picture(i, e.image, e.truth, (e.truth,)) for i, e in enumerate(made))
    if data == "world":
        from tokenreduce.zoo import world

        first = world.SPLITS["test"].start
        scenes = [world.scene(first + i, objects=(3, 6)) for i in range(MOST)]
        return tuple(_scene(i, s, (), world.ask(s, first + i, 6)) for i, s in enumerate(scenes))
    return _second() if data == "world2" else ()


def _second() -> tuple[Picture, ...]:
    """Without documents and with at most two signs, as the benchmark's are."""
    from tokenreduce.zoo import world2

    first = world2.SPLITS["test"].start
    out: list[Picture] = []
    number = 0
    while len(out) < MOST:
        seen = world2.scene(first + number, objects=(3, 6))
        if seen.document is None and 1 <= len(seen.signs) <= 2:
            seed = first + number
            asked = [*world2.ask(seen, seed, 1, "read"), *world2.ask(seen, seed, 5)]
            out.append(_scene(number, seen, seen.signs, asked))
        number += 1
    return tuple(out)


def _scene(number: int, seen: Any, signs: Any, asked: Any) -> Picture:
    truth = [f"{t.colour} {t.kind}" for t in seen.objects] + [f"sign {s.text.upper()}" for s in signs]
    labels = dict.fromkeys([*(t.kind for t in seen.objects), *(c for s in signs for c in s.text)])
    questions = {q.text: q.answer for q in asked}
    return Picture(number, Image.fromarray(seen.image), ", ".join(truth), tuple(labels), tuple(questions.items()))
