"""Questions about a scene of the second world: those of the first, and reading, tables, lists and descriptions.

====================  ==========================================  ==============================================
type                  text                                        answer
====================  ==========================================  ==============================================
``read``              what does the sign say that is red          its characters: "k 7 2"
``letter``            what letter is second on the sign red       one character
``where_read``        what does the sign say next to the star     the characters of the sign beside it
``cell``              what is in row two column three             one digit of the document
``list``              list the things from left to right          "red star blue ring ..."
``describe``          describe the picture                        "stripes , red star , ... , sign blue k 7 , ..."
====================  ==========================================  ==============================================

The word that a question is about comes last where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from tokenreduce.zoo.world.questions import TWO_HOP, Groups, Question, draw_questions, scene_types
from tokenreduce.zoo.world2.scenes import Scene, Thing
from tokenreduce.zoo.world2.signs import Sign
from tokenreduce.zoo.world2.vocabulary import KINDS, NUMBERS, ORDINALS

__all__ = ["IMAGE_TYPES", "LONG", "MIX", "READING", "TWO_HOP", "ask", "beside", "spelt"]

#: A sign is next to a thing up to so many pixels between them, and no other sign may be nearer than the second number.
NEXT, APART = 8, 24
_ROOM = 12  # half of what a thing has for itself


def spelt(text: str) -> str:
    """A text as an answer says it, character by character."""
    return " ".join(text)


def beside(what: Scene, thing: Thing) -> Sign | None:
    """The sign next to ``thing``; None where there is none, or another one is too near to say."""

    def gap(sign: Sign) -> int:
        left, top, right, bottom = sign.box
        wide = max(left - (thing.x + _ROOM), thing.x - _ROOM - right)
        return max(wide, max(top - (thing.y + _ROOM), thing.y - _ROOM - bottom))

    near = sorted(what.signs, key=gap)
    if not near or gap(near[0]) > NEXT or (len(near) > 1 and gap(near[1]) < APART):
        return None
    return near[0]


def _read(what: Scene) -> Groups:
    return [(1, [(f"what does the sign say that is {s.colour}", spelt(s.text)) for s in what.signs])]


def _letter(what: Scene) -> Groups:
    pairs = [(s.colour, o, c) for s in what.signs for o, c in zip(ORDINALS, s.text, strict=False)]
    return [(1, [(f"what letter is {o} on the sign {colour}", c) for colour, o, c in pairs])]


def _where_read(what: Scene) -> Groups:
    seen = Counter(t.kind for t in what.objects)
    near = [(t, beside(what, t)) for t in what.objects if seen[t.kind] == 1]
    return [(1, [(f"what does the sign say next to the {t.kind}", spelt(s.text)) for t, s in near if s])]


def _cell(what: Scene) -> Groups:
    rows = what.document.rows if what.document else ()
    pairs = [
        (f"what is in row {NUMBERS[r]} column {NUMBERS[c]}", digit)
        for r, row in enumerate(rows, 1)
        for c, digit in enumerate(row, 1)
    ]
    return [(1, pairs)]


def _list(what: Scene) -> Groups:
    return [(1, [("list the things from left to right", " ".join(f"{t.colour} {t.kind}" for t in what.objects))])]


def _describe(what: Scene) -> Groups:
    parts = [what.background, *(f"{t.colour} {t.kind}" for t in what.objects)]
    parts += [f"sign {s.colour} {spelt(s.text)}" for s in what.signs]
    if what.document:
        rows = what.document.rows
        parts.append(f"document {NUMBERS[len(rows)]} rows {NUMBERS[len(rows[0])]} columns")
    return [(1, [("describe the picture", " , ".join(parts))])]


_OF_SCENE: dict[str, Callable] = {
    **scene_types(KINDS, NUMBERS),
    "read": _read,
    "letter": _letter,
    "where_read": _where_read,
    "cell": _cell,
    "list": _list,
    "describe": _describe,
}
#: Types about texts, and types with long answers.
READING = ("read", "letter", "where_read", "cell")
LONG = ("list", "describe")
IMAGE_TYPES = tuple(_OF_SCENE)

#: How often a type is drawn when nothing else is said, relative to the others that have a question left.
MIX = {
    **dict.fromkeys(IMAGE_TYPES, 1.0),
    "count_all": 0.6, "background": 0.7, "relation": 1.2, "count_colour": 1.2, "read": 1.5, "describe": 0.7,
}  # fmt: skip


def ask(
    what: Scene, seed: int, n: int, types: str | Collection[str] | Mapping[str, float] | None = None
) -> list[Question]:
    """``n`` different questions about ``what``, drawn by ``seed``; arguments and errors as in
    :func:`tokenreduce.zoo.world.ask`."""
    return draw_questions(what, _OF_SCENE, seed, n, types, MIX, stream=12)
