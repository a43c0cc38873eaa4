"""Training batches of the generated world as numpy arrays: a function of seed and step, made in any process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenreduce.zoo.world.clips import clip
from tokenreduce.zoo.world.scenes import scene
from tokenreduce.zoo.world.vocabulary import SPLITS, TEXTURES

__all__ = ["Pictures", "pictures", "seeds"]

#: Objects per scene while the encoder is trained: many, because every object is supervision, and some scenes with few.
MANY, FEW = (3, 10), (1, 2)


@dataclass(frozen=True)
class Pictures:
    """``pixels`` (B,112,112,3) uint8; ``kinds``, ``colours`` (B,14,14) int64, -1 background; ``background``,
    ``count`` (B,) int64, count -1 where it is not known."""

    pixels: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray
    background: np.ndarray
    count: np.ndarray


def seeds(split: str, n: int, rng: np.random.Generator) -> list[int]:
    """``n`` scene seeds of ``split``."""
    span = SPLITS[split]
    return [int(s) for s in rng.integers(span.start, span.stop, n)]


def pictures(step: int, *, batch: int, seed: int, moving: int = 0, split: str = "train") -> Pictures:
    """``batch`` labelled pictures, the last ``moving`` of them frames of one clip, where objects stand between the
    places of the lattice."""
    rng = np.random.default_rng((seed, step))
    rows = []
    for i, s in enumerate(seeds(split, batch - moving, rng)):
        made = scene(s, objects=FEW if i % 4 == 0 else MANY)
        rows.append((made.image, made.kinds, made.colours, TEXTURES.index(made.background), len(made.objects)))
    if moving:
        film = clip(seeds(split, 1, rng)[0], objects=(3, 3))
        for t in np.linspace(0, len(film.frames) - 1, moving).round().astype(int):
            rows.append((film.frames[t], film.kinds[t], film.colours[t], TEXTURES.index(film.background), -1))
    image, kinds, colours, background, count = zip(*rows, strict=True)
    return Pictures(
        np.stack(image), np.stack(kinds).astype(np.int64), np.stack(colours).astype(np.int64), np.array(background),
        np.array(count),
    )  # fmt: skip
