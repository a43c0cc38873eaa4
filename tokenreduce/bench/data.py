"""Labelled images by name: embedded digits, generated scenes, class folders, saved Hugging Face data sets, webdataset.

=====================================  =====================================================================
``digits``                             the MNIST digits of the zoo, 4,000 train and 1,000 test
``world``                              1,000 generated scenes with 3 to 6 things, labelled with all their kinds
``world2``                             1,000 of the second world, labelled with kinds of things and characters of signs
``world2-one``                         1,000 of it with one thing each, labelled with its colour and kind ("red star")
``FOLDER`` or ``folder:FOLDER``        ``FOLDER/class/*.jpg`` or ``FOLDER/<split>/class/*.jpg``
``hf:FOLDER``                          what ``datasets.Dataset.save_to_disk`` wrote
``wds:PATTERN`` or ``*.tar``           webdataset shards, ``shard-{000..009}.tar`` or ``shard-*.tar``
=====================================  =====================================================================

An image that cannot be decoded is a :class:`Problem`: counted, listed with its path and reason, never dropped
silently. Every source is read by position, so that workers, limits and repeated passes see the same images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenreduce.bench import zeroshot
from tokenreduce.bench.models import Loaded
from tokenreduce.bench.reading import Problem, Source
from tokenreduce.bench.sources import READERS, kind_of
from tokenreduce.common.images import as_rgb, why

__all__ = ["Batch", "Images", "Problem", "balanced", "load_data"]

Row = tuple[int, "Tensor | Problem", Any]


class Batch(NamedTuple):
    """``ids`` (B,) positions in the data set, ``x`` (B,C,H,W), ``y`` labels, all of the readable images.

    ``y`` is (B,), or (B,m) where images have several labels, -1 where one has fewer than m.
    """

    ids: Tensor
    x: Tensor
    y: Tensor


@dataclass
class Images(Dataset):  # type: ignore[type-arg]
    """A labelled image data set. Iterating yields ``(index, tensor, label)`` of the images that can be read.

    ``classes`` are the names behind the labels; ``problems`` lists what could not be read so far (an image that fails
    in two passes is listed once); ``notes`` says what was left out or assumed. ``upright`` turns images by EXIF, as a
    viewer does; published accuracies on ImageNet are of the pixels as they are stored.
    """

    name: str
    source: Source
    items: list[Any]
    labels: list[Any]
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    upright: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Tensor | Problem:
        """The transformed image at ``index``, or why it cannot be had."""
        item = self.items[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self.source.open(item) as image:
                    return self.transform(as_rgb(ImageOps.exif_transpose(image) if self.upright else image))
        except Exception as error:  # whatever a broken file makes a decoder raise
            return Problem(self.source.where(item), f"{type(error).__name__}: {why(error)}")

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self.items):
            raise IndexError(index)
        return index, self.read(index), self.labels[index]

    def _list(self, problems: Sequence[Problem]) -> None:
        self.problems.extend(p for p in problems if p not in self.problems)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Any]]:
        for index in range(len(self)):
            value = self.read(index)
            if isinstance(value, Problem):
                self._list([value])
            else:
                yield index, value, self.labels[index]

    def batches(self, batch: int = 64, workers: int = 0) -> Iterator[Batch]:
        """All readable images in order, ``batch`` at a time. Raises ``ValueError`` for images of different sizes."""
        for got, problems, shapes in DataLoader(self, batch, num_workers=workers, collate_fn=_collate):
            self._list(problems)
            _refuse(shapes)
            if got is not None:
                yield got

    def group(self, places: Sequence[int]) -> tuple[Batch | None, list[Problem]]:
        """The images at ``places`` as one batch, None where none of them can be read, and the problems among them.
        Raises ``ValueError`` for images of different sizes."""
        got, problems, shapes = _collate([self[i] for i in places])
        _refuse(shapes)
        return got, problems

    def add_problems(self, problems: Sequence[Problem]) -> None:
        """List what another process could not read."""
        self._list(problems)


def _refuse(shapes: list[tuple[int, ...]]) -> None:
    if shapes:
        raise ValueError(
            f"the model's transform gives images of different sizes {shapes[:3]}, which do not fit into one batch; use "
            "batch=1, or a checkpoint whose processor crops to one size"
        )


def _collate(rows: list[Row]) -> tuple[Batch | None, list[Problem], list[tuple[int, ...]]]:
    """In the worker: one tensor per batch (one tensor per image would use up file descriptors), and the problems."""
    problems = [v for _, v, _ in rows if isinstance(v, Problem)]
    good = [(i, v, y) for i, v, y in rows if isinstance(v, Tensor)]
    if not good:
        return None, problems, []
    ids, x, y = zip(*good, strict=True)
    shapes = sorted({tuple(t.shape) for t in x})
    if len(shapes) > 1:
        return None, problems, shapes
    return Batch(torch.tensor(ids), torch.stack(x), torch.tensor(y)), problems, []


def load_data(
    name: str,
    split: str,
    loaded: Loaded,
    limit: int | None = None,
    seed: int = 0,
    classes: str | Path | Sequence[str] | None = None,
) -> Images:
    """A data set by name (see the module's page), with labels that are the outputs of ``loaded``.

    Class names become labels so: names from ``classes`` (a file with one per line, a sequence or ``imagenet``); else
    WordNet ids; else the model's own label names; else the sorted order, if the model has as many outputs. A
    zero-shot model takes any names. ``limit`` draws that many images, the same number of every class as far as they
    go, from ``seed``; all if there are fewer. Splits go by their usual names (test, val, validation); shards have none.

    Raises ``ValueError`` that names cause and fix for a missing or empty data set, an unknown split, classes that do
    not fit the model, and a ``limit`` below 1; ``ImportError`` naming the extra for a missing library.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is a number of images >= 1 or None for all, not {limit!r}")
    kind, place = kind_of(name)
    read = READERS[kind](place, split, loaded, zeroshot.read_classes(classes))
    if not read.items:
        found = "".join(f"\n  {p.path}: {p.reason}" for p in read.problems[:5])
        raise ValueError(f"{name} holds no usable image{':' if found else '; it is empty'}{found}")
    items, labels = read.items, read.labels
    if limit is not None and limit < len(items):
        chosen = balanced(labels, limit, seed)
        items, labels = [items[i] for i in chosen], [labels[i] for i in chosen]
    return Images(name, read.source, items, labels, read.classes, loaded.transform, read.notes, read.problems)


def balanced(labels: Sequence[Any], limit: int, seed: int) -> list[int]:
    """Sorted positions of ``limit`` items: one of every class in turn, at random within a class and among classes."""
    generator = torch.Generator().manual_seed(seed)
    turns: dict[Any, int] = {}
    ranked = []
    for place, i in enumerate(torch.randperm(len(labels), generator=generator).tolist()):
        turn = turns.get(labels[i], 0)
        turns[labels[i]] = turn + 1
        ranked.append((turn, place, i))
    return sorted(i for _, _, i in sorted(ranked)[:limit])
