"""Training batches of the second world as numpy arrays: a function of seed and step, made in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenreduce.zoo.world2.scenes import Scene, scene
from tokenreduce.zoo.world2.vocabulary import TEXTURES
from tokenreduce.zoo.world_batches import seeds

__all__ = ["FEW", "FULL", "SPARSE", "Sights", "choose", "ranks", "sights"]

#: Scenes that teach the encoder hold much, because everything in them is supervision; a quarter are as others are.
FULL: dict[str, Any] = dict(objects=(2, 8), signs=(4, 8), document=0.6)
SPARSE: dict[str, Any] = dict(objects=(3, 10), signs=(1, 3), document=0.3)
#: What the classifier is asked about. Where nearly every character occurs, naming them teaches nothing.
FEW: dict[str, Any] = dict(objects=(3, 6), signs=(1, 2), document=0.0)


@dataclass(frozen=True)
class Sights:
    """``pixels`` (B,224,224,3) uint8; ``labels`` (B,6,784) int64: kind, colour, character, slot, owner and the rank of
    a thing from the left, -1 for none; ``background``, ``count`` (B,)."""

    pixels: np.ndarray
    labels: np.ndarray
    background: np.ndarray
    count: np.ndarray


def ranks(made: Scene) -> np.ndarray:
    """(784,) how many things stand to the left of the thing at every patch, -1 without a thing.

    Things are sorted from left to right: it is the number of the owner.
    """
    owners = made.labels.owners.ravel()
    return np.where((owners >= 0) & (owners < len(made.objects)), owners, -1)


def labels(made: Scene) -> np.ndarray:
    """(6,784) labels of every patch, see :class:`Sights`."""
    known = made.labels
    rows = (known.kinds, known.colours, known.characters, known.slots, known.owners)
    return np.stack([*(a.ravel() for a in rows), ranks(made)])


def choose(owned: np.ndarray, kept: int, rng: np.random.Generator, blind: bool = False) -> np.ndarray:
    """(B,K) patches in order: what shows something (``owned`` (B,N)) first, then any; with ``blind`` any."""
    score = rng.random(owned.shape) + (0 if blind else owned)
    return np.sort(np.argsort(-score, -1)[..., :kept], -1)


def sights(
    step: int, *, batch: int, seed: int, split: str = "train",
    scenes: Sequence[dict[str, Any]] = (SPARSE, FULL, FULL, FULL),
) -> Sights:  # fmt: skip
    """``batch`` labelled pictures, of each of ``scenes`` (settings of :func:`.scene`) in turn."""
    rng = np.random.default_rng((22, seed, step))
    made = [scene(s, **scenes[i % len(scenes)]) for i, s in enumerate(seeds(split, batch, rng))]
    return Sights(
        np.stack([m.image for m in made]), np.stack([labels(m) for m in made]),
        np.array([TEXTURES.index(m.background) for m in made]), np.array([len(m.objects) for m in made]),
    )  # fmt: skip
