"""Batches of clips that teach ``world-llava-2``: 2x2 patches of a frame are one token there."""

from __future__ import annotations

import numpy as np

from tokenreduce.zoo.world2.clip_questions import ask
from tokenreduce.zoo.world2.clips import Clip, clip, frame_labels
from tokenreduce.zoo.world2.scenes import CHARACTER_OF, PLATE_OF
from tokenreduce.zoo.world2.vocabulary import GRID
from tokenreduce.zoo.world2_lessons import (
    TELLS,
    Course,
    Lesson,
    lesson,
    letters,
    look_and_keep,
    placed,
    rows,
    shows,
)
from tokenreduce.zoo.world2_pointers import film_pointers
from tokenreduce.zoo.world2_words import IDS
from tokenreduce.zoo.world_batches import seeds
from tokenreduce.zoo.world_words import BOS, IMAGE

__all__ = ["any_lesson", "film_lesson"]

SIDE = GRID // 2
CELLS = SIDE * SIDE
MOTIONS = ("left", "right", "still")


def any_lesson(step: int, *, course: Course, seed: int, split: str = "train") -> Lesson:
    """The batch of ``step``: of clips in the share of steps that ``course.video`` says, else of pictures."""
    video = course.video and np.random.default_rng((25, seed, step)).random() < course.video
    return (film_lesson if video else lesson)(step, course=course, seed=seed, split=split)


def film_lesson(step: int, *, course: Course, seed: int, split: str = "train") -> Lesson:
    """The batch of ``step``, of clips."""
    rng = np.random.default_rng((26, seed, step))
    made = [clip(s, frames=course.frames) for s in seeds(split, course.clips, rng)]
    known = np.stack([cells(m) for m in made])  # (B,F,6,196)
    b, f = known.shape[:2]
    flat = known.reshape(b * f, *known.shape[2:])
    seen, keep = look_and_keep(flat[:, 4], course.seen_frame, course.keep_frame, course.blind, rng)
    at = np.take_along_axis(seen, keep, 1)  # (B*F,K) cells
    k = at.shape[1]
    starts = 1 + (CELLS + 1) * np.arange(f)
    places = np.concatenate(
        [np.broadcast_to(starts[None, :, None], (b, f, 1)), at.reshape(b, f, k) + starts[:, None] + 1], 2
    )
    places = np.concatenate([np.zeros((b, 1), dtype=np.int64), places.reshape(b, -1)], 1)
    positions, text = placed(places, 1 + (CELLS + 1) * f, rng, course)
    asked = [ask(m, int(rng.integers(1 << 40)), course.video_questions, course.video_types) for m in made]
    words, after, points = rows(asked, [[film_pointers(m, q) for q in row] for m, row in zip(made, asked, strict=True)])
    kept = np.take_along_axis(flat, at[:, None], 2)  # (B*F,6,K)
    shown = np.stack([
        shows(made[i // f].background, known_, at_, SIDE) for i, (known_, at_) in enumerate(zip(kept, at, strict=True))
    ])  # fmt: skip
    frame = np.broadcast_to(np.arange(f)[None, :, None], (b, f, k)).reshape(b, -1)
    owners = kept[:, 4].reshape(b, -1)
    return Lesson(
        np.stack([m.frames for m in made]), _patches(seen), keep, np.array([BOS, *([IDS["frame"], *[IMAGE] * k] * f)]),
        positions, text, words, after, points, tuple(tuple(q.type for q in row) for row in asked),
        shown.reshape(b, f * k, -1), owners, frame,
        np.stack([_tells(*x) for x in zip(made, owners, frame, strict=True)]),
    )  # fmt: skip


def _patches(cells_: np.ndarray) -> np.ndarray:
    """(B,4*S) patches of (B,S) cells, four after four."""
    row, column = np.divmod(cells_, SIDE)
    first = 2 * row * GRID + 2 * column
    four = first[..., None] + np.array([0, 1, GRID, GRID + 1])
    return four.reshape(len(cells_), -1)


def cells(made: Clip) -> np.ndarray:
    """(F,6,196) labels of every cell, as :func:`.world2_batches.labels` has them of patches: of what owns most of its
    patches. No thing has a number from the left."""
    out = []
    for i in range(len(made.frames)):
        found = frame_labels(made, i)
        all_ = np.stack([found.kinds, found.colours, found.characters, found.slots, found.owners])
        four = all_.reshape(5, SIDE, 2, SIDE, 2).transpose(0, 1, 3, 2, 4).reshape(5, CELLS, 4)
        own = four[4]
        votes = (own[..., None] == own[:, None]).sum(-1) * (own >= 0)
        best = np.take_along_axis(four, votes.argmax(-1)[None, :, None], 2)[..., 0]
        out.append(np.concatenate([best, np.full((1, CELLS), -1)]))
    return np.stack(out)


def _tells(made: Clip, owners: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(K,9) answers to :data:`~.world2_lessons.TELLS`, -1 for tokens without a thing."""
    names = list(TELLS)
    out = np.full((len(owners), len(TELLS)), -1)
    text = _last_texts(made, owners, frame)
    for i, actor in enumerate(made.objects):
        here, later = owners == i, frame > actor.entry
        out[here & later, 0] = MOTIONS.index(actor.motion)
        changes = np.array([f for f, _ in actor.changes])
        out[here, 1] = np.where(later[here], np.where(np.isin(frame[here], changes), 2, 0), 1)
        out[here, 2] = i
        out[here, names.index("times")] = (frame[here, None] >= changes[1:]).sum(1)
        out[here, names.index("sign") : names.index("sign2") + 1] = text[here]
    return out


def _last_texts(made: Clip, owners: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(K,2) the characters of the sign as every token has last seen it (a token sees those before it), -1 before."""
    out = np.full((len(owners), 2), -1)
    last = (-1, -1)
    for k, owner in enumerate(owners):
        if CHARACTER_OF <= owner < CHARACTER_OF + PLATE_OF:
            last = letters(made.sign_at(int(frame[k])).text)
        out[k] = last
    return out
