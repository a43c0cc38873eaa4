"""Images that come with the package: digits, and scenes of both generated worlds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenreduce.bench.labels import digits_of, match_names
from tokenreduce.bench.models import Loaded
from tokenreduce.bench.reading import SPLITS, Classes, Read, Source, find_split

__all__ = ["read_digits", "read_world", "read_world2", "read_world2_one"]


# -- the embedded digits -----------------------------------------------------------------------------------------------
class _Digits(Source):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels  # (n,28,28) uint8

    def open(self, item: Any) -> Image.Image:
        return Image.fromarray(self.pixels[item].numpy())

    def where(self, item: Any) -> str:
        return f"digit {item}"


def read_digits(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    from tokenreduce.zoo import digits

    x, y = digits.load_data("test" if split in SPLITS["test"] else split)
    pixels = ((x * digits.STD + digits.MEAN) * 255).round().to(torch.uint8)[:, 0]
    index, names = match_names(digits_of(10), loaded, classes, "digits")
    return Read(_Digits(pixels), list(range(len(y))), [index[i] for i in y.tolist()], names)


# -- the generated world -----------------------------------------------------------------------------------------------
#: Things in a scene, and scenes in the data set. One or two things are too easy: every method keeps them.
WORLD_OBJECTS, WORLD_SCENES = (3, 6), 1000


class _Scenes(Source):
    """Scenes that ``draw`` makes of their seeds; ``of`` says of what world."""

    def __init__(self, draw: Callable[[int], Any], of: str = "") -> None:
        self.draw, self.of = draw, of

    def open(self, item: Any) -> Image.Image:
        return Image.fromarray(self.draw(item).image)

    def where(self, item: Any) -> str:
        return f"scene of seed {item}{self.of}"


def _scene(seed: int) -> Any:
    from tokenreduce.zoo.world import scene

    return scene(seed, objects=WORLD_OBJECTS)


def read_world(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    """Scenes with the kinds of their things as labels: as many as things may be there, -1 for none."""
    from tokenreduce.zoo.world import KINDS
    from tokenreduce.zoo.world import SPLITS as SEEDS

    found, notes = find_split(split, list(SEEDS), "world")
    index, names = match_names(KINDS, loaded, classes, "world")
    label = dict(zip(KINDS, index, strict=True))
    seeds = list(SEEDS[found][:WORLD_SCENES])
    labels: list[tuple[int, ...]] = []
    for seed in seeds:
        there = sorted({label[t.kind] for t in _scene(seed).objects})
        labels.append((*there, *[-1] * (WORLD_OBJECTS[1] - len(there))))
    return Read(_Scenes(_scene), seeds, labels, names, notes)


def _scene2(seed: int) -> Any:
    from tokenreduce.zoo.world2 import scene

    return scene(seed, objects=WORLD_OBJECTS, signs=(1, 2), document=0.0)


def read_world2(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    """Scenes with the kinds of their things and the characters of their signs as labels, -1 for none."""
    from tokenreduce.zoo.world2 import CHARACTERS, KINDS
    from tokenreduce.zoo.world2 import SPLITS as SEEDS

    found, notes = find_split(split, list(SEEDS), "world2")
    known = (*KINDS, *CHARACTERS)
    index, names = match_names(known, loaded, classes, "world2")
    label = dict(zip(known, index, strict=True))
    seeds = list(SEEDS[found][:WORLD_SCENES])
    there = [{t.kind for t in s.objects} | {c for sign in s.signs for c in sign.text} for s in map(_scene2, seeds)]
    most = max(map(len, there))
    labels = [(*(row := sorted(label[k] for k in kinds)), *[-1] * (most - len(row))) for kinds in there]
    return Read(_Scenes(_scene2, " of the second world"), seeds, labels, names, notes)


def _scene_of_one(seed: int) -> Any:
    from tokenreduce.zoo.world2 import scene
    from tokenreduce.zoo.world2_texts import ONE

    return scene(seed, **ONE)


def read_world2_one(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    """Scenes with one thing; its colour and kind are the label, "red star", one of 96."""
    from tokenreduce.zoo.world2 import SPLITS as SEEDS
    from tokenreduce.zoo.world2_texts import PAIRS

    found, notes = find_split(split, list(SEEDS), "world2-one")
    index, names = match_names(PAIRS, loaded, classes, "world2-one")
    label = dict(zip(PAIRS, index, strict=True))
    seeds = list(SEEDS[found][:WORLD_SCENES])
    things = [_scene_of_one(s).objects[0] for s in seeds]
    source = _Scenes(_scene_of_one, " of the second world, with one thing")
    return Read(source, seeds, [label[f"{t.colour} {t.kind}"] for t in things], names, notes)
