"""Batches that teach a language model to look: pictures or clips, packed questions, and what every token shows.

A lesson keeps only some visual tokens (fewer are faster, and the model learns to live with gaps) and sometimes numbers
them anew, so that the model answers whether a reduced sequence keeps its original position ids or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenreduce.zoo.world.clips import Clip, clip
from tokenreduce.zoo.world.questions import ask
from tokenreduce.zoo.world.scenes import Scene, scene
from tokenreduce.zoo.world.vocabulary import COLOURS, KINDS, MOTIONS
from tokenreduce.zoo.world_batches import seeds
from tokenreduce.zoo.world_words import BOS, IDS, IMAGE, PAD, encode

__all__ = ["Course", "Lesson", "lesson"]

#: Tokens of a question with its answer.
WORDS = 10
GRID, POOLED = 14, 7
_KINDS = np.array([IDS[w] for w in KINDS])
_COLOURS = np.array([IDS[w] for w in COLOURS])


@dataclass(frozen=True)
class Course:
    """What the lessons of a stage are like.

    Args:
        keep: visual tokens kept per picture, one is drawn per batch.
        keep_frame: the same per frame of a clip (of 49).
        renumber: share of batches with position ids without gaps.
        shift: share of batches whose text starts somewhere else than where the model will see it.
        video: share of batches that are clips.
        types, video_types: weights of question types; None for the world's own mixture.
        copy_colour: share of things that repeat a colour.
        blind: share of batches that keep tokens at random instead of things first.
    """

    keep: tuple[int, ...] = (64,)
    keep_frame: tuple[int, ...] = (16,)
    renumber: float = 0.0
    shift: float = 0.0
    video: float = 0.0
    types: dict[str, float] | None = field(default=None, hash=False)
    video_types: dict[str, float] | None = field(default=None, hash=False)
    copy_colour: float = 0.25
    blind: float = 0.0
    scenes: int = 16
    clips: int = 5
    questions: int = 12
    video_questions: int = 8


@dataclass(frozen=True)
class Lesson:
    """One batch; K visual tokens in a prefix of P, Q questions of T tokens, F frames (1 for pictures).

    ``pixels`` (B,F,112,112,3) uint8; ``prefix`` (B,P) token ids; ``positions`` (B,P); ``keep`` (B,K) visual tokens that
    are there, frame by frame; ``text`` (B,) position of the first question word; ``words`` (B,Q,T) ids with the answer
    behind the last word; ``last`` (B,Q) index of that word; ``answers`` (B,Q); ``types`` Q names per sample;
    ``shows`` (B,K,4) word ids that the token shows (kind or texture, colour, left/right, top/bottom), -1 for none;
    ``motion``, ``new`` (B,K) index in MOTIONS and whether its thing enters in this frame, -1 where that is no question.
    """

    pixels: np.ndarray
    prefix: np.ndarray
    positions: np.ndarray
    keep: np.ndarray
    text: np.ndarray
    words: np.ndarray
    last: np.ndarray
    answers: np.ndarray
    types: tuple[tuple[str, ...], ...]
    shows: np.ndarray
    motion: np.ndarray
    new: np.ndarray


def lesson(step: int, *, course: Course, seed: int, split: str = "train", video: bool | None = None) -> Lesson:
    """The batch of ``step``; ``video`` decides whether it is of clips (by the course's share when None)."""
    rng = np.random.default_rng((seed, step))
    drawn = rng.random() < course.video
    video = drawn if video is None else video
    made: list[Any]
    if video:
        made = [clip(s) for s in seeds(split, course.clips, rng)]
        types, n, kept = course.video_types, course.video_questions, int(rng.choice(course.keep_frame))
    else:
        made = [scene(s, copy_colour=course.copy_colour) for s in seeds(split, course.scenes, rng)]
        types, n, kept = course.types, course.questions, int(rng.choice(course.keep))
    labels = [_labels(m) for m in made]
    keep = _keep(np.stack([x["kind"] for x in labels]) >= 0, kept, rng, blind=rng.random() < course.blind)
    prefix, positions, text = _prefix(keep, video, rng, course)
    frames, per = keep.shape[1], 49 if video else 196
    flat = (keep + per * np.arange(frames)[:, None]).reshape(len(made), -1)
    words = np.full((len(made), n, WORDS), PAD)
    last, answers = np.zeros((2, len(made), n), dtype=np.int64)
    names = []
    for i, m in enumerate(made):
        asked = ask(m, int(rng.integers(1 << 40)), n, types)
        names.append(tuple(a.type for a in asked))
        for j, question in enumerate(asked):
            ids = [*encode(question.text), IDS[question.answer]]
            words[i, j, : len(ids)] = ids
            last[i, j], answers[i, j] = len(ids) - 2, ids[-1]
    at = [{k: v.reshape(-1, *v.shape[2:])[f] for k, v in x.items()} for x, f in zip(labels, flat, strict=True)]
    shows, motion, new = (np.stack([x[k] for x in at]) for k in ("shows", "motion", "new"))
    pixels = np.stack([m.frames if isinstance(m, Clip) else m.image[None] for m in made])
    return Lesson(
        pixels, prefix, positions, flat, text, words, last, answers, tuple(names), shows, motion, new
    )  # fmt: skip


def _labels(made: Scene | Clip) -> dict[str, np.ndarray]:
    """Per frame and visual token, (F,N) or (F,N,4): what ``Lesson`` says about it."""
    if isinstance(made, Clip):
        kind, colour = _pool(made.kinds, made.colours)
        side = POOLED
    else:
        kind, colour = made.kinds[None].reshape(1, -1), made.colours[None].reshape(1, -1)
        side = GRID
    frames, n = kind.shape
    thing = kind >= 0
    row, column = np.divmod(np.arange(n), side)
    shows = np.full((frames, n, 4), -1)
    shows[..., 0] = np.where(thing, _KINDS[kind], IDS[made.background])
    shows[..., 1] = np.where(thing, _COLOURS[colour], -1)
    for k, (axis, low, high) in enumerate(((column, "left", "right"), (row, "top", "bottom"))):
        word = np.where(2 * axis + 1 < side, IDS[low], np.where(2 * axis + 1 > side, IDS[high], -1))
        shows[..., 2 + k] = np.where(thing, word, -1)
    motion, new = np.full((2, frames, n), -1)
    if isinstance(made, Clip):
        for thing_ in made.objects:
            here = (kind == KINDS.index(thing_.kind)) & (colour == COLOURS.index(thing_.colour))
            late = np.arange(frames)[:, None] > thing_.entry
            motion[here & late] = MOTIONS.index(thing_.motion)
            new[here] = np.broadcast_to(~late, here.shape)[here]
    return {"kind": kind, "shows": shows, "motion": motion, "new": new}


def _pool(kinds: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,49) labels of 2x2 patches from (T,14,14): of the thing that has most of them, background only without any."""
    t = len(kinds)
    both = np.where(kinds >= 0, kinds.astype(np.int64) * len(COLOURS) + colours, -1)
    four = both.reshape(t, POOLED, 2, POOLED, 2).transpose(0, 1, 3, 2, 4).reshape(t, -1, 4)
    votes = (four[..., None] == four[..., None, :]).sum(-1) * (four >= 0)
    best = np.take_along_axis(four, votes.argmax(-1)[..., None], -1)[..., 0]
    return np.where(best >= 0, best // len(COLOURS), -1), np.where(best >= 0, best % len(COLOURS), -1)


def _keep(thing: np.ndarray, kept: int, rng: np.random.Generator, blind: bool) -> np.ndarray:
    """(B,F,K) indices in order: things first, then any; or any."""
    score = rng.random(thing.shape) + (0 if blind else thing)
    return np.sort(np.argsort(-score, -1)[..., :kept], -1)


def _prefix(keep: np.ndarray, video: bool, rng: np.random.Generator, course: Course) -> tuple[np.ndarray, ...]:
    """Ids (B,P) and positions (B,P) of the prefix, and the position (B,) of the first question word."""
    b, frames, k = keep.shape
    if video:
        ids = np.array([BOS, *([IDS["frame"], *[IMAGE] * k] * frames)])
        starts = 1 + 50 * np.arange(frames)
        places = np.concatenate([np.broadcast_to(starts[None, :, None], (b, frames, 1)), keep + starts[:, None] + 1], 2)
        places, end = places.reshape(b, -1), 1 + 50 * frames
    else:
        ids, places, end = np.array([BOS, *[IMAGE] * k]), 1 + keep[:, 0], 197
    places = np.concatenate([np.zeros((b, 1), dtype=np.int64), places], 1)
    how = rng.random()
    if how < course.renumber:
        places, end = np.broadcast_to(np.arange(len(ids)), places.shape), len(ids)
    elif how < course.renumber + course.shift:
        end = max(end + int(rng.integers(-40, 201)), int(places.max()) + 1)
    return np.broadcast_to(ids, places.shape).copy(), places.copy(), np.full(b, end)
