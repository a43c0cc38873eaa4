"""Where the words of an answer are read, in scenes and clips of the second world: what leads there, and the place."""

from __future__ import annotations

from collections.abc import Callable

from tokenreduce.zoo.world2.clip_questions import spans
from tokenreduce.zoo.world2.clips import Clip
from tokenreduce.zoo.world2.questions import Question, beside
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, Scene
from tokenreduce.zoo.world2.vocabulary import NUMBERS, ORDINALS

__all__ = ["Point", "film_pointers", "pointers"]

#: Owner of tokens (see :data:`~.scenes.CHARACTER_OF`), and the frames [first, stop) that count.
Point = tuple[int, int, int]
NOWHERE: Point = (-1, 0, 0)


def pointers(made: Scene, question: Question) -> list[tuple[int, int]]:
    """For each word of the answer two owners (see :data:`~.scenes.CHARACTER_OF`), -1 for none: where to look first
    (the thing that the question names, or what was said before) and where the word can be read."""
    words = question.text.split()
    n = len(question.answer.split())
    if question.type in _LEADS:
        return _LEADS[question.type](made, words, n)
    there = _THERE[question.type](made, words) if question.type in _THERE else -1
    return [(there, there)] * n


def _called(made: Scene, kind: str) -> int:
    return next(i for i, t in enumerate(made.objects) if t.kind == kind)


def _sign(made: Scene, colour: str) -> int:
    return next(i for i, s in enumerate(made.signs) if s.colour == colour)


def _one(made: Scene, **what: str) -> int:
    """The first thing of this kind and colour, -1 for none."""
    return next((i for i, t in enumerate(made.objects) if all(getattr(t, k) == v for k, v in what.items())), -1)


def _other(made: Scene, words: list[str], _: int) -> list[tuple[int, int]]:
    own = _called(made, words[-1])
    colour = made.objects[own].colour
    return [(own, i) for i, t in enumerate(made.objects) if i != own and t.colour == colour]


def _beside(made: Scene, words: list[str], n: int) -> list[tuple[int, int]]:
    thing = _called(made, words[-1])
    i = made.signs.index(beside(made, made.objects[thing]))  # type: ignore[arg-type]
    return [(thing, CHARACTER_OF + 10 * i), *_spelt(i, n)[1:]]


def _listed(made: Scene, _: list[str], __: int) -> list[tuple[int, int]]:
    return [at for i in range(len(made.objects)) for at in ((max(i - 1, 0), i), (i, i))]


def _spelt(sign: int, n: int) -> list[tuple[int, int]]:
    own = CHARACTER_OF + 10 * sign
    return [(own + max(j - 1, 0), own + j) for j in range(n)]


def _in_quarter(made: Scene, top: bool, left: bool) -> int:
    middle = made.image.shape[0] // 2
    there = [i for i, t in enumerate(made.objects) if (t.y < middle) == top and (t.x < middle) == left]
    return there[0] if len(there) == 1 else -1


def _described(made: Scene, _: list[str], n: int) -> list[tuple[int, int]]:
    out = [(-1, -1)]  # the background
    for i in range(len(made.objects)):
        out += [(i - 1, -1), (max(i - 1, 0), i), (i, i)]
    for i, sign in enumerate(made.signs):
        own = CHARACTER_OF + 10 * i
        before = own - 10 if i else -1
        out += [(before, -1), (before, -1), (before, own), *_spelt(i, len(sign.text))]
    return out + [(-1, -1)] * (n - len(out))


#: By type, the owner at which an answer of one word is read.
_THERE: dict[str, Callable[[Scene, list[str]], int]] = {
    "colour_of": lambda made, words: _called(made, words[-1]),
    "side": lambda made, words: _called(made, words[-1]),
    "kind_of": lambda made, words: _one(made, colour=words[-1]),
    "exist": lambda made, words: _one(made, colour=words[-2], kind=words[-1]),
    "at_kind": lambda made, words: _in_quarter(made, words[-2] == "top", words[-1] == "left"),
    "at_colour": lambda made, words: _in_quarter(made, words[-2] == "top", words[-1] == "left"),
    "letter": lambda made, words: CHARACTER_OF + 10 * _sign(made, words[-1]) + ORDINALS.index(words[3]),
    "cell": lambda made, words: CELL_OF + 3 * (NUMBERS.index(words[4]) - 1) + NUMBERS.index(words[6]) - 1,
}
#: By type, both owners of every word, where the way there is another one.
_LEADS: dict[str, Callable[[Scene, list[str], int], list[tuple[int, int]]]] = {
    "relation": lambda made, words, _: [(_called(made, words[2]), _called(made, words[-1]))],
    "other_kind": _other,
    "other_count": lambda made, words, _: [(_called(made, words[-1]), -1)],
    "read": lambda made, words, n: _spelt(_sign(made, words[-1]), n),
    "where_read": _beside,
    "list": _listed,
    "describe": _described,
}


# -- clips -------------------------------------------------------------------------------------------------------------
def film_pointers(made: Clip, question: Question) -> list[tuple[Point, Point]]:
    """As :func:`pointers`, in time: for each word of the answer what leads to it and where it is read."""
    words, n = question.text.split(), len(question.answer.split())
    return _IN_CLIP[question.type](made, words, n)


def _actor(made: Clip, kind: str) -> int:
    return next(i for i, a in enumerate(made.objects) if a.kind == kind)


def _always(made: Clip, i: int) -> Point:
    return i, made.objects[i].entry, len(made.frames)


def _enters(made: Clip, i: int) -> Point:
    return i, made.objects[i].entry, made.objects[i].entry + 1


def _order(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    i = _actor(made, words[-1])
    return [(_always(made, i), _always(made, i - 1 if "before" in words else i + 1))]


def _end(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    if words[-1] == "first":
        return [((0, 0, 1), (0, 0, 1))]
    i = len(made.objects) - 1
    return [(_enters(made, i), _always(made, i))]


def _count_events(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    i = _actor(made, words[-1])
    return [(_always(made, i), (i, len(made.frames) - 2, len(made.frames)))]  # the last know how often it changed


def _read_at(made: Clip, words: list[str], n: int) -> list[tuple[Point, Point]]:
    i, stop = _actor(made, words[-1]), len(made.frames)
    a, b, _ = next(p for p in spans(made.objects[i].changes, stop) if p[2] == words[words.index("when") + 1])
    return [((i, a, b), (i, a + 1, b))] * n  # its tokens know what the sign said; the first may know the text before


def _colour_at(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    i, stop = _actor(made, words[words.index("the") + 1]), len(made.frames)
    text = "".join(words[words.index("say") + 1 :])
    start, end = next(p[:2] for p in spans(made.texts, stop) if p[2] == text)
    return [((CHARACTER_OF, start, end), (i, start, end))]


def _direction(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    i = _actor(made, words[-1])
    return [(_always(made, i), (i, made.objects[i].entry + 1, len(made.frames)))]


def _appear(made: Clip, words: list[str], _: int) -> list[tuple[Point, Point]]:
    for i, a in enumerate(made.objects):
        for start, end, colour in spans(a.changes, len(made.frames)):
            if (colour, a.kind) == (words[-2], words[-1]):
                return [((i, start, end), (i, start, end))]
    return [(NOWHERE, NOWHERE)]


_IN_CLIP: dict[str, Callable[[Clip, list[str], int], list[tuple[Point, Point]]]] = {
    "order": _order,
    "first": _end,
    "last": _end,
    "count_events": _count_events,
    "read_at": _read_at,
    "colour_at": _colour_at,
    "direction": _direction,
    "appear": _appear,
}
