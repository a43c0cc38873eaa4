"""Batches that teach ``world-llava-2``: pictures, packed questions with answers of several words, what every token
shows, and at which token every word of an answer is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tokenreduce.zoo.world2.questions import LONG, Question, ask, beside
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF, Scene, scene
from tokenreduce.zoo.world2.vocabulary import CHARACTERS, COLOURS, GRID, KINDS, NUMBERS, ORDINALS
from tokenreduce.zoo.world2_batches import labels
from tokenreduce.zoo.world2_words import IDS, encode
from tokenreduce.zoo.world_batches import seeds
from tokenreduce.zoo.world_words import EOS, PAD

__all__ = ["SHOWN", "Course", "Lesson", "lesson", "pointers"]

N = GRID * GRID
#: Words that a token can show: what it is, its colour, left/right, top/bottom, and two places (on a sign, in a table;
#: of a thing its number from the left).
SHOWN = 6
_KINDS, _COLOURS, _CHARACTERS, _ORDINALS, _NUMBERS = (
    np.array([IDS[w] for w in words]) for words in (KINDS, COLOURS, CHARACTERS, ORDINALS, NUMBERS)
)


@dataclass(frozen=True)
class Course:
    """What the lessons of a stage are like.

    Args:
        seen: patches that the tower sees, those that show something first.
        keep: of them, those that the language model gets; one is drawn per batch. One patch of everything comes first.
        renumber: share of batches with position ids without gaps.
        shift: share of batches whose text starts somewhere else than where the model will see it.
        types: weights of question types with short answers.
        long: share of batches that ask for long answers.
        copy_colour: share of things that repeat a colour.
        blind: share of batches that keep tokens at random instead.
        scene: further settings of the scenes.
    """

    seen: int = 160
    keep: tuple[int, ...] = (64, 96)
    renumber: float = 0.0
    shift: float = 0.0
    types: dict[str, float] | None = field(default=None, hash=False)
    long: float = 0.0
    copy_colour: float = 0.25
    blind: float = 0.0
    scenes: int = 16
    questions: int = 12
    scene: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Lesson:
    """One batch: S patches seen, K of them kept, Q questions of T words with their answers.

    ``pixels`` (B,224,224,3) uint8; ``seen`` (B,S) patches; ``keep`` (B,K) indices into ``seen``; ``positions`` (B,1+K)
    of ``<bos>`` and the tokens, ``text`` (B,) of the first word; ``words`` (B,Q,T); ``next`` (B,Q,T) the word that
    should come behind, -1 inside a question; ``points`` (B,Q,T,2) owners of the tokens that lead to that word and at
    which it is read, -1 for none; ``types`` Q names per sample; ``shows`` (B,K,6) word ids, -1 for none; ``owners``
    (B,K).
    """

    pixels: np.ndarray
    seen: np.ndarray
    keep: np.ndarray
    positions: np.ndarray
    text: np.ndarray
    words: np.ndarray
    next: np.ndarray
    points: np.ndarray
    types: tuple[tuple[str, ...], ...]
    shows: np.ndarray
    owners: np.ndarray


def lesson(step: int, *, course: Course, seed: int, split: str = "train") -> Lesson:
    """The batch of ``step``."""
    rng = np.random.default_rng((24, seed, step))
    long = rng.random() < course.long
    made = [scene(s, copy_colour=course.copy_colour, **course.scene) for s in seeds(split, course.scenes, rng)]
    known = np.stack([labels(m) for m in made])
    seen, keep = _choose(known[:, 4], course, rng)
    positions, text = _positions(np.take_along_axis(seen, keep, 1), rng, course)
    n = len(LONG) if long else course.questions
    asked = [_ask(m, int(rng.integers(1 << 40)), n, course, long) for m in made]
    words, after, points = _rows(made, asked)
    flat = np.take_along_axis(seen, keep, 1)
    shows = np.stack([_shows(m, k, f) for m, k, f in zip(made, known, flat, strict=True)])
    owners = np.take_along_axis(known[:, 4], flat, 1)
    names = tuple(tuple(q.type for q in row) for row in asked)
    return Lesson(
        np.stack([m.image for m in made]), seen, keep, positions, text, words, after, points, names, shows, owners
    )


def _ask(made: Scene, seed: int, n: int, course: Course, long: bool) -> list[Question]:
    if long:
        return [q for t in LONG for q in ask(made, seed, 1, t)]
    return ask(made, seed, n, course.types)


def _choose(owners: np.ndarray, course: Course, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Patches that the tower sees (B,S), in order, and which of them are kept (B,K)."""
    score = rng.random(owners.shape)
    if rng.random() >= course.blind:
        score += owners >= 0
        for row, own in zip(score, owners, strict=True):
            # The best patch of every owner, so that nothing in the picture is out of sight.
            _, first = np.unique(np.where(own >= 0, own, -1)[np.argsort(-row)], return_index=True)
            row[np.argsort(-row)[first]] += own[np.argsort(-row)[first]] >= 0
    kept = int(rng.choice(course.keep))
    order = np.argsort(-score, -1)
    seen = np.sort(order[:, : max(course.seen, kept)], -1)
    wanted = np.zeros(owners.shape, dtype=bool)
    np.put_along_axis(wanted, order[:, :kept], True, 1)
    keep = np.stack([np.flatnonzero(w[s]) for w, s in zip(wanted, seen, strict=True)])
    return seen, keep


def _positions(flat: np.ndarray, rng: np.random.Generator, course: Course) -> tuple[np.ndarray, np.ndarray]:
    """Positions (B,1+K) of the prefix, and the position (B,) of the first question word."""
    b, k = flat.shape
    places = np.concatenate([np.zeros((b, 1), dtype=np.int64), 1 + flat], 1)
    end, how = 1 + N, rng.random()
    if how < course.renumber:
        places, end = np.broadcast_to(np.arange(1 + k), places.shape), 1 + k
    elif how < course.renumber + course.shift:
        end = max(end + int(rng.integers(-160, 201)), int(places.max()) + 1)
    return places.copy(), np.full(b, end)


def _rows(made: list[Scene], asked: list[list[Question]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``words``, ``next`` and ``points`` of a :class:`Lesson`."""
    texts = [[(encode(q.text), encode(q.answer)) for q in row] for row in asked]
    most = max(len(a) + len(b) for row in texts for a, b in row)
    most = -(-most // 4) * 4
    words = np.full((len(made), len(asked[0]), most), PAD)
    after, points = np.full(words.shape, -1), np.full((*words.shape, 2), -1)
    for i, (m, row) in enumerate(zip(made, asked, strict=True)):
        for j, question in enumerate(row):
            ask_, said = texts[i][j]
            start = len(ask_) - 1
            words[i, j, : len(ask_) + len(said)] = [*ask_, *said]
            after[i, j, start : start + len(said) + 1] = [*said, EOS]
            points[i, j, start : start + len(said)] = pointers(m, question)
    return words, after, points


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


def _shows(made: Scene, known: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """(K,6) words that the tokens ``flat`` show; ``known`` (6,N) are the labels of the picture."""
    kind, colour, character, slot, owner, rank = known[:, flat]
    shows = np.full((len(flat), SHOWN), -1)
    shows[:, 0] = np.where(kind >= 0, _KINDS[kind], np.where(character >= 0, _CHARACTERS[character], -1))
    shows[owner < 0, 0] = IDS[made.background]
    plate = (owner >= CHARACTER_OF) & (owner % 10 == PLATE_OF) & (owner < CELL_OF)
    shows[plate, 0] = IDS["sign"]
    shows[:, 1] = np.where(colour >= 0, _COLOURS[colour], -1)
    row, column = np.divmod(flat, GRID)
    for k, (axis, low, high) in enumerate(((column, "left", "right"), (row, "top", "bottom"))):
        shows[:, 2 + k] = np.where(kind >= 0, np.where(axis < GRID // 2, IDS[low], IDS[high]), -1)
    shows[rank >= 0, 4] = _NUMBERS[1 + rank[rank >= 0]]
    sign, cell = (slot >= 0) & (slot < 4), slot >= 4
    shows[sign, 4] = _ORDINALS[slot[sign]]
    shows[cell, 4], shows[cell, 5] = _NUMBERS[1 + (slot[cell] - 4) // 3], _NUMBERS[1 + (slot[cell] - 4) % 3]
    return shows
