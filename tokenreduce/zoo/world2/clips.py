"""Clips of 16 to 32 frames in which things enter one after the other, move, change colour, and a sign changes its text.

Everything keeps to a lane of its own, so nothing is ever hidden; what a clip asks for is when things happen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenreduce.zoo.world.drawing import ANGLES, BOX, Draw, compose, tint
from tokenreduce.zoo.world.scenes import LATTICE, Thing, check_objects
from tokenreduce.zoo.world2.scenes import SIZES, Labels, ground, labels_of
from tokenreduce.zoo.world2.signs import Sign, extent, paint_sign
from tokenreduce.zoo.world2.vocabulary import CANVAS, CHARACTERS, COLOURS, KINDS, TEXTURES

__all__ = ["FRAMES", "Actor", "Clip", "clip", "frame_labels"]

#: Fewest and most frames.
FRAMES = 16, 32
#: Height of a lane; pixels per frame; how long a colour or a text stays at least; size of a clip's letters.
LANE, SPEEDS, STAY, LETTER = 24, (4, 8), 3, 16
_LOW, _HIGH = 12, CANVAS - 12
_STEP = {"left": -1, "right": 1, "still": 0}


@dataclass(frozen=True)
class Actor:
    """A thing that enters at frame ``entry`` at (x, y) and moves ``speed`` pixels per frame, until the picture ends.

    ``changes`` are (frame, colour) from its entry on; ``motion`` is left, right or still.
    """

    kind: str
    changes: tuple[tuple[int, str], ...]
    x: int
    y: int
    size: int
    angle: int
    motion: str
    speed: int
    entry: int

    @property
    def colour(self) -> str:
        """Its first colour."""
        return self.changes[0][1]

    def at(self, frame: int) -> Thing | None:
        """What is seen of it in ``frame``, None before it enters."""
        if frame < self.entry:
            return None
        x = self.x + _STEP[self.motion] * self.speed * (frame - self.entry)
        colour = [c for f, c in self.changes if f <= frame][-1]
        return Thing(self.kind, colour, min(max(x, _LOW), _HIGH), self.y, self.size, self.angle)


@dataclass(frozen=True, eq=False)
class Clip:
    """A video with everything that is known about it.

    ``frames`` (T,224,224,3) uint8; ``objects`` by entry, no two at the same frame; ``texts`` are (frame, text) of the
    one ``sign``. Every thing has a kind of its own. The background stands still, the noise is new in every frame.
    """

    frames: np.ndarray = field(repr=False)
    objects: tuple[Actor, ...]
    sign: Sign
    texts: tuple[tuple[int, str], ...]
    background: str
    seed: int

    def sign_at(self, frame: int) -> Sign:
        """The sign with its text in ``frame``."""
        text = [t for f, t in self.texts if f <= frame][-1]
        return Sign(text, self.sign.colour, self.sign.x, self.sign.y, self.sign.size)


def _moments(draw: Draw, start: int, stop: int, most: int) -> list[int]:
    """``start`` and up to ``most`` later frames, :data:`STAY` apart from each other and from ``stop``."""
    out = [start]
    for _ in range(draw.below(most + 1)):
        free = [f for f in range(start + STAY, stop - STAY + 1) if all(abs(f - g) >= STAY for g in out)]
        if not free:
            break
        out.append(draw.choice(free))
    return sorted(out)


def _actor(draw: Draw, kind: str, entry: int, lane: int, frames: int) -> Actor:
    moments = _moments(draw, entry, frames, 3)
    colours = draw.sample(COLOURS, len(moments))
    motion, speed = draw.choice(tuple(_STEP)), draw.choice(SPEEDS)
    far = min(speed * (frames - 1 - entry), CANVAS // 2) if motion != "still" else 0
    low = _LOW + (far if motion == "left" else 0)
    high = _HIGH - (far if motion == "right" else 0)
    x = low + LATTICE * draw.below((high - low) // LATTICE + 1)
    turn = ANGLES[0] if draw.random() < 0.6 else draw.choice(ANGLES[1:])
    return Actor(
        kind, tuple(zip(moments, colours, strict=True)), x, LANE * lane + LANE // 2, draw.choice(SIZES), turn, motion,
        0 if motion == "still" else speed, entry,
    )  # fmt: skip


def clip(seed: int, *, frames: int | None = None, objects: tuple[int, int] = (2, 4)) -> Clip:
    """The clip of ``seed`` with between ``objects[0]`` and ``objects[1]`` things (6 at most) and one sign.

    ``frames`` is 16 to 32, drawn from the seed where nothing is said. Raises ``ValueError`` for other numbers.
    """
    check_objects(objects, 6, f"a clip with {CANVAS} x {CANVAS} pixels")
    if frames is not None and not FRAMES[0] <= frames <= FRAMES[1]:
        raise ValueError(f"frames is {FRAMES[0]} to {FRAMES[1]}, not {frames}")
    draw = Draw(11, seed)
    texture = draw.choice(TEXTURES)
    drawn = draw.between(*FRAMES)
    frames = frames or drawn
    n = draw.between(*objects)
    # Everything has entered when half of the clip is over, so that there is time to see it.
    entries = sorted([0, *draw.sample(range(1, frames // 2), n - 1)])
    lanes = draw.sample(range(CANVAS // LANE), n + 1)
    kinds = draw.sample(KINDS, n)
    actors = tuple(_actor(draw, k, e, lane, frames) for k, e, lane in zip(kinds, entries, lanes, strict=False))
    moments = _moments(draw, 0, frames, 4)
    texts = ["".join(draw.choice(CHARACTERS) for _ in range(draw.between(1, 2))) for _ in moments]
    wide, _ = extent(2, LETTER)
    x = LATTICE * draw.below((CANVAS - wide) // LATTICE + 1)
    sign = Sign(texts[0], draw.choice(COLOURS), x, LANE * lanes[n], LETTER)
    made = Clip(np.empty(0), actors, sign, tuple(zip(moments, texts, strict=True)), texture, int(seed))
    return Clip(_paint(draw, made, frames), actors, sign, made.texts, texture, int(seed))


def _paint(draw: Draw, made: Clip, frames: int) -> np.ndarray:
    base, plate = ground(made.background, draw), tint(made.sign.colour, draw)
    tints = {c: tint(c, draw) for c in COLOURS}
    out = []
    for frame in range(frames):
        page = base.copy()
        paint_sign(page, made.sign_at(frame), plate)
        seen = [t for a in made.objects if (t := a.at(frame))]
        out.append(compose(page, [(t, t.x, t.y, tints[t.colour]) for t in seen], draw))
    return np.stack(out)


def frame_labels(made: Clip, frame: int) -> Labels:
    """What every patch of a frame shows; things are numbered as in ``made.objects``."""
    seen = [(i, t) for i, a in enumerate(made.objects) if (t := a.at(frame))]
    return labels_of([t for _, t in seen], [made.sign_at(frame)], None, [i for i, _ in seen])


assert max(SIZES) + 2 <= LANE
assert BOX // 2 <= _LOW
