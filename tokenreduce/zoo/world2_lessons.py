"""Batches that teach ``world-llava-2``: pictures, packed questions with answers of several words, what every token
shows, and at which token every word of an answer is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenreduce.zoo.world2.questions import LONG, Question, ask, beside
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF, Scene, scene
from tokenreduce.zoo.world2.vocabulary import CHARACTERS, COLOURS, GRID, KINDS, NUMBERS, ORDINALS, PATCH
from tokenreduce.zoo.world2_batches import labels
from tokenreduce.zoo.world2_pointers import Point, pointers
from tokenreduce.zoo.world2_words import IDS, encode
from tokenreduce.zoo.world_batches import seeds
from tokenreduce.zoo.world_words import BOS, EOS, IMAGE, PAD

__all__ = ["SHOWN", "TELLS", "Course", "Lesson", "lesson", "letters", "look_and_keep", "placed", "rows", "shows"]

N = GRID * GRID
#: Words that a token can show: what it is, its colour, left/right, top/bottom, and two places (on a sign, in a table;
#: of a thing its number from the left).
SHOWN = 6
#: What tokens of things and signs are asked inside the language model, and the number of answers (1: a number). In
#: clips: how the thing moves; whether it is as in the frame before, new, or of another colour; how many came before
#: it; how often it has changed so far. In both: the first and the second character of the sign last seen (clips) or of
#: the one beside it (pictures), where that stands before the token. In pictures: the kind of thing beside a sign that
#: stands before it; where the thing is, in patches.
TELLS = {
    "motion": 3, "event": 3, "rank": 6, "times": 4, "sign": len(CHARACTERS), "sign2": len(CHARACTERS) + 1,
    "beside": len(KINDS), "across": 1, "down": 1,
}  # fmt: skip
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
        video: share of batches that show ``clips`` clips of ``frames`` frames instead, with ``video_questions`` each.
        seen_frame, keep_frame: as ``seen`` and ``keep``, in cells of 2x2 patches per frame (of 196).
        video_types: weights of question types about clips.
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
    video: float = 0.0
    seen_frame: int = 24
    keep_frame: tuple[int, ...] = (10,)
    video_types: dict[str, float] | None = field(default=None, hash=False)
    clips: int = 8
    frames: int = 16
    video_questions: int = 10


@dataclass(frozen=True)
class Lesson:
    """One batch of pictures, or of clips of F frames (pictures: F is 1): S patches of a frame are seen, K tokens of it
    kept, Q questions have T words with their answers.

    ``pixels`` (B,F,224,224,3) uint8; ``seen`` (B*F,S) patches; ``keep`` (B*F,K) indices into ``seen``, of clips into
    its fours, which are one token; ``prefix`` (P) word ids, :data:`~.world_words.IMAGE` where a token stands;
    ``positions`` (B,P), ``text`` (B,) of the first word of a question; ``words`` (B,Q,T); ``next`` (B,Q,T) the word
    that should come behind, -1 inside a question; ``points`` (B,Q,T,2,3) owner, first frame and frame behind the last
    of the tokens that lead to that word and at which it is read, -1 for none; ``types`` Q names per sample; ``shows``
    (B,F*K,6) word ids, -1 for none; ``owners``, ``frame`` (B,F*K); ``tells`` (B,F*K,9) answers to :data:`TELLS`, -1
    for none.
    """

    pixels: np.ndarray
    seen: np.ndarray
    keep: np.ndarray
    prefix: np.ndarray
    positions: np.ndarray
    text: np.ndarray
    words: np.ndarray
    next: np.ndarray
    points: np.ndarray
    types: tuple[tuple[str, ...], ...]
    shows: np.ndarray
    owners: np.ndarray
    frame: np.ndarray
    tells: np.ndarray


def lesson(step: int, *, course: Course, seed: int, split: str = "train") -> Lesson:
    """The batch of ``step``, of pictures."""
    rng = np.random.default_rng((24, seed, step))
    long = rng.random() < course.long
    made = [scene(s, copy_colour=course.copy_colour, **course.scene) for s in seeds(split, course.scenes, rng)]
    known = np.stack([labels(m) for m in made])
    seen, keep = look_and_keep(known[:, 4], course.seen, course.keep, course.blind, rng)
    flat = np.take_along_axis(seen, keep, 1)
    positions, text = _positions(flat, rng, course)
    n = len(LONG) if long else course.questions
    asked = [_ask(m, int(rng.integers(1 << 40)), n, course, long) for m in made]
    at = [[_still(pointers(m, q)) for q in row] for m, row in zip(made, asked, strict=True)]
    words, after, points = rows(asked, at)
    owners = np.take_along_axis(known[:, 4], flat, 1)
    return Lesson(
        np.stack([m.image for m in made])[:, None], seen, keep, np.array([BOS, *[IMAGE] * flat.shape[1]]), positions,
        text, words, after, points, tuple(tuple(q.type for q in row) for row in asked),
        np.stack([shows(m.background, k[:, f], f, GRID) for m, k, f in zip(made, known, flat, strict=True)]), owners,
        np.zeros_like(owners), np.stack([_tells(*x) for x in zip(made, owners, strict=True)]),
    )  # fmt: skip


def letters(text: str) -> tuple[int, int]:
    """Answers of a token that is asked for the two characters of ``text``; behind the last number: no second one."""
    return CHARACTERS.index(text[0]), CHARACTERS.index(text[1]) if len(text) > 1 else len(CHARACTERS)


def _tells(made: Scene, owners: np.ndarray) -> np.ndarray:
    """(K,9) answers to :data:`TELLS` of the tokens of a picture."""
    names = list(TELLS)
    out = np.full((len(owners), len(TELLS)), -1)
    place = np.arange(len(owners))
    for i, thing in enumerate(made.objects):
        own = owners == i
        out[own, names.index("across")], out[own, names.index("down")] = thing.x // PATCH, thing.y // PATCH
        sign = beside(made, thing)
        if sign is None:
            continue
        first = CHARACTER_OF + 10 * made.signs.index(sign)
        characters = (owners >= first) & (owners < first + PLATE_OF)
        if characters.any():
            later = own & (place > place[characters].max())
            out[later, names.index("sign")], out[later, names.index("sign2")] = letters(sign.text)
        if own.any():
            out[characters & (place > place[own].min()), names.index("beside")] = KINDS.index(thing.kind)
    return out


def _ask(made: Scene, seed: int, n: int, course: Course, long: bool) -> list[Question]:
    if long:
        return [q for t in LONG for q in ask(made, seed, 1, t)]
    return ask(made, seed, n, course.types)


def _still(at: list[tuple[int, int]]) -> list[tuple[Point, Point]]:
    return [((a, 0, 1), (b, 0, 1)) for a, b in at]


def look_and_keep(
    owners: np.ndarray, seen: int, keep: tuple[int, ...], blind: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Of places with ``owners`` (B,N), those that the tower sees (B,S), in order, and indices (B,K) into them of what
    is kept: what shows something first, one place of every owner before all, or with probability ``blind`` any."""
    score = rng.random(owners.shape)
    if rng.random() >= blind:
        score += owners >= 0
        for row, own in zip(score, owners, strict=True):
            # The best place of every owner, so that nothing in the picture is out of sight.
            _, first = np.unique(np.where(own >= 0, own, -1)[np.argsort(-row)], return_index=True)
            row[np.argsort(-row)[first]] += own[np.argsort(-row)[first]] >= 0
    kept = int(rng.choice(keep))
    order = np.argsort(-score, -1)
    found = np.sort(order[:, : max(seen, kept)], -1)
    wanted = np.zeros(owners.shape, dtype=bool)
    np.put_along_axis(wanted, order[:, :kept], True, 1)
    return found, np.stack([np.flatnonzero(w[s]) for w, s in zip(wanted, found, strict=True)])


def _positions(flat: np.ndarray, rng: np.random.Generator, course: Course) -> tuple[np.ndarray, np.ndarray]:
    return placed(np.concatenate([np.zeros((len(flat), 1), dtype=np.int64), 1 + flat], 1), 1 + N, rng, course)


def placed(places: np.ndarray, end: int, rng: np.random.Generator, course: Course) -> tuple[np.ndarray, np.ndarray]:
    """``positions`` and ``text`` of a :class:`Lesson` whose prefix stands at ``places`` (B,P) of 0 to ``end`` - 1, or
    without gaps, or has its question somewhere else."""
    b, p = places.shape
    how = rng.random()
    if how < course.renumber:
        places, end = np.broadcast_to(np.arange(p), places.shape), p
    elif how < course.renumber + course.shift:
        end = max(end + int(rng.integers(-160, 201)), int(places.max()) + 1)
    return places.copy(), np.full(b, end)


def rows(
    asked: list[list[Question]], at: list[list[list[tuple[Point, Point]]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``words``, ``next`` and ``points`` of a :class:`Lesson`; ``at`` says where the words of each answer are read."""
    texts = [[(encode(q.text), encode(q.answer)) for q in row] for row in asked]
    most = max(len(a) + len(b) for row in texts for a, b in row)
    most = -(-most // 4) * 4
    words = np.full((len(asked), len(asked[0]), most), PAD)
    after, points = np.full(words.shape, -1), np.full((*words.shape, 2, 3), -1)
    for i, row in enumerate(texts):
        for j, (question, said) in enumerate(row):
            start = len(question) - 1
            words[i, j, : len(question) + len(said)] = [*question, *said]
            after[i, j, start : start + len(said) + 1] = [*said, EOS]
            points[i, j, start : start + len(said)] = at[i][j]
    return words, after, points


def shows(background: str, known: np.ndarray, flat: np.ndarray, side: int) -> np.ndarray:
    """(K,6) words that tokens show whose labels are ``known`` (6,K), at places ``flat`` of a grid of this ``side``."""
    kind, colour, character, slot, owner, rank = known
    out = np.full((len(flat), SHOWN), -1)
    out[:, 0] = np.where(kind >= 0, _KINDS[kind], np.where(character >= 0, _CHARACTERS[character], -1))
    out[owner < 0, 0] = IDS[background]
    plate = (owner >= CHARACTER_OF) & (owner % 10 == PLATE_OF) & (owner < CELL_OF)
    out[plate, 0] = IDS["sign"]
    out[:, 1] = np.where(colour >= 0, _COLOURS[colour], -1)
    row, column = np.divmod(flat, side)
    for k, (axis, low, high) in enumerate(((column, "left", "right"), (row, "top", "bottom"))):
        out[:, 2 + k] = np.where(kind >= 0, np.where(axis < side // 2, IDS[low], IDS[high]), -1)
    out[rank >= 0, 4] = _NUMBERS[1 + rank[rank >= 0]]
    sign, cell = (slot >= 0) & (slot < 4), slot >= 4
    out[sign, 4] = _ORDINALS[slot[sign]]
    out[cell, 4], out[cell, 5] = _NUMBERS[1 + (slot[cell] - 4) // 3], _NUMBERS[1 + (slot[cell] - 4) % 3]
    return out
