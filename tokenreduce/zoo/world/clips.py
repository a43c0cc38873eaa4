"""Short videos of things that enter, move and stand still, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenreduce.zoo.world.drawing import BOX, Draw, background, compose, labels, reach, tint
from tokenreduce.zoo.world.scenes import LATTICE, bounds, check_objects, looks
from tokenreduce.zoo.world.vocabulary import CANVAS, MOTIONS, TEXTURES

__all__ = ["Clip", "Mover", "clip"]

_LOW, _HIGH = bounds(CANVAS)
_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
#: Pixels per frame. Multiples of the lattice, so that an encoder trained on scenes knows every frame of a clip.
SPEEDS = (8, 12)
#: Every thing is seen in at least this many frames, or its direction could not be asked.
SEEN = 3


@dataclass(frozen=True)
class Mover:
    """A thing that enters at frame ``entry`` with its centre at (x, y) and then moves ``speed`` pixels per frame.

    ``motion`` is one of ``MOTIONS``. It stays until the end; at the edge of the picture it stops.
    """

    kind: str
    colour: str
    x: int
    y: int
    size: int
    angle: int
    motion: str
    speed: int
    entry: int

    def at(self, frame: int) -> tuple[int, int] | None:
        """Its centre in ``frame``, None before it enters."""
        if frame < self.entry:
            return None
        dx, dy = _STEP[self.motion]
        far = self.speed * (frame - self.entry)
        return min(max(self.x + dx * far, _LOW), _HIGH), min(max(self.y + dy * far, _LOW), _HIGH)


@dataclass(frozen=True, eq=False)
class Clip:
    """A video with everything that is known about it.

    ``frames`` (T,112,112,3) uint8; ``kinds`` and ``colours`` (T,14,14) int8 as in :class:`~.scenes.Scene`. The
    background stands still and the noise is new in every frame. Things never overlap, and no two enter together.
    """

    frames: np.ndarray = field(repr=False)
    objects: tuple[Mover, ...]
    background: str
    kinds: np.ndarray = field(repr=False)
    colours: np.ndarray = field(repr=False)
    seed: int


def _start(draw: Draw, new: Mover, others: list[Mover], frames: int) -> tuple[int, int] | None:
    """A random place to enter from which ``new`` reaches no other thing while both are seen; None if there is none."""
    steps = min(new.speed * (frames - 1 - new.entry), _HIGH - _LOW)
    dx, dy = _STEP[new.motion]
    axes = (np.arange(_LOW - min(0, d) * steps, _HIGH - max(0, d) * steps + 1, LATTICE) for d in (dx, dy))
    starts = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    good = np.ones(len(starts), dtype=bool)
    for other in others:
        times = np.arange(max(new.entry, other.entry), frames)
        path = starts[:, None] + np.array([dx, dy]) * new.speed * (times - new.entry)[:, None]
        there = np.array([other.at(int(t)) for t in times])
        apart = np.abs(path.clip(_LOW, _HIGH) - there).max(-1)
        good &= (apart >= reach(new.size) + reach(other.size)).all(1)
    left = starts[good]
    if not len(left):
        return None
    x, y = left[draw.below(len(left))]
    return int(x), int(y)


def _movers(draw: Draw, n: int, frames: int) -> list[Mover]:
    last = frames - SEEN
    # Two things entering together would make "first" and "last" ambiguous; frame 0 is the likeliest entry.
    entries = draw.sample(range(1, last + 1), n) if n <= last else draw.sample(range(last + 1), n)
    if n <= last and draw.random() < 0.6:
        entries[draw.below(n)] = 0
    plans = []
    for (kind, colour, size, angle), entry in zip(looks(draw, n, 0.25), entries, strict=True):
        plans.append(Mover(kind, colour, 0, 0, size, angle, draw.choice(MOTIONS), draw.choice(SPEEDS), entry))
    out: list[Mover] = []
    for plan in plans:
        place = _start(draw, plan, out, frames)
        if place is None:
            break
        out.append(_with(plan, *place))
    else:
        return out
    # No room beside the first ones: every thing gets its own row, in which it may only move sideways.
    out = []
    for plan, y in zip(plans, draw.sample(range(_LOW, _HIGH + 1, BOX), n), strict=True):
        motion = plan.motion if plan.motion not in ("up", "down") else draw.choice(("left", "right", "still"))
        plan = _with(plan, 0, y, motion)
        place = _start(draw, plan, [], frames)
        assert place is not None  # nothing is in the way
        out.append(_with(plan, place[0], y))
    return out


def _with(plan: Mover, x: int, y: int, motion: str | None = None) -> Mover:
    motion = motion or plan.motion
    speed = 0 if motion == "still" else plan.speed
    return Mover(plan.kind, plan.colour, x, y, plan.size, plan.angle, motion, speed, plan.entry)


def clip(seed: int, *, frames: int = 8, objects: tuple[int, int] = (1, 3)) -> Clip:
    """The clip of ``seed``: ``frames`` pictures of 112 x 112 with between ``objects[0]`` and ``objects[1]`` things.

    Raises ``ValueError`` for fewer than 3 frames and when the things do not fit (five rows, and each needs an entry
    frame of its own).
    """
    if frames < SEEN:
        raise ValueError(f"frames must be at least {SEEN}, not {frames}")
    fit = min((_HIGH - _LOW) // BOX + 1, frames - SEEN + 1)
    check_objects(objects, fit, f"a clip of {frames} frames with {CANVAS} x {CANVAS} pixels")
    draw = Draw(1, seed)
    texture = draw.choice(TEXTURES)
    movers = tuple(_movers(draw, draw.between(*objects), frames))
    base = background(texture, draw, CANVAS)
    tints = [tint(m.colour, draw) for m in movers]
    images, kinds, colours = [], [], []
    for t in range(frames):
        seen = [(m, *place, rgb) for m, rgb in zip(movers, tints, strict=True) if (place := m.at(t))]
        images.append(compose(base, seen, draw))
        k, c = labels([(m, x, y) for m, x, y, _ in seen], CANVAS)
        kinds.append(k)
        colours.append(c)
    return Clip(np.stack(images), movers, texture, np.stack(kinds), np.stack(colours), int(seed))
