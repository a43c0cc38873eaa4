"""One encoder on all images of a data set, part by part."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenreduce.bench.data import Images
from tokenreduce.bench.models import Loaded, load_model
from tokenreduce.bench.reading import Problem
from tokenreduce.bench.sources import all_images
from tokenreduce.bench.vision_parts import check_place, inference
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.core.trace import record
from tokenreduce.encoding.features import features
from tokenreduce.patching import describe, patched

__all__ = ["Encoding", "Features"]


class Features(NamedTuple):
    """What one part of the images became.

    Attributes:
        ids: (n,) positions in the data set, int64, of the images that could be used, ascending.
        places: (n,) their files, rows or members of shards.
        vectors: (n,D) float32, or float16 where asked for.
        problems: images that could not be used.
    """

    ids: np.ndarray
    places: list[str]
    vectors: np.ndarray
    problems: list[Problem]


@dataclass
class Encoding:
    """What is encoded, by what, and how.

    Args:
        model: an image model by name, see :mod:`tokenreduce.bench.models`.
        data: a folder of images (with all folders in it), ``hf:FOLDER``, shards, or embedded data; labels are
            not needed.
        reduce: methods of the encoder stage, "" for the stock model.
        split: part of data that has parts.
        limit: the first so many images; None for all.
        batch: images per forward.
        rows: images per part; a part is one file, and what a killed run repeats.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        amp: ``bf16`` or ``fp16`` autocast.
        normalize: scale vectors to length 1.
        half: store float16.

    Raises ``ValueError`` for bad settings and methods of other stages.
    """

    model: str
    data: str
    reduce: str = ""
    split: str = "test"
    limit: int | None = None
    batch: int = 64
    rows: int = 1024
    device: str = "cpu"
    amp: str | None = None
    normalize: bool = False
    half: bool = False

    _loaded: Loaded | None = field(default=None, init=False, repr=False)
    _images: Images | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for key in ("batch", "rows", "limit"):
            value = getattr(self, key)
            if not (key == "limit" and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{key} is an int >= 1, not {value!r}")
        check_place(self.device, self.amp)
        if wrong := [r.spec() for r in self.reducers if r.stage != "encoder"]:
            raise ValueError(f"{', '.join(wrong)} acts outside of the encoder; features come from the encoder alone")

    @property
    def reducers(self) -> tuple[Reducer, ...]:
        """The methods."""
        return tuple(parse(self.reduce, stage="encoder")) if self.reduce else ()

    def settings(self) -> dict[str, Any]:
        """Everything that features depend on."""
        told = asdict(self)
        return {key: value for key, value in told.items() if not key.startswith("_") and key != "device"}

    # -- loading -------------------------------------------------------------------------------------------------------
    def load(self) -> None:
        """Load the model and list the images; a second call does nothing.

        Raises what :func:`~tokenreduce.bench.models.load_model` and :func:`~tokenreduce.bench.sources.all_images`
        raise, and ``TypeError`` for a model without adapter.
        """
        if self._loaded is not None:
            return
        loaded = load_model(self.model, self.device)
        describe(loaded.model)
        read = all_images(self.data, self.split, loaded)
        items = read.items[: self.limit]
        nothing = [-1] * len(items)
        self._images = Images(
            self.data, read.source, items, nothing, (), loaded.transform, read.notes, list(read.problems), upright=True
        )
        self._loaded = loaded

    @property
    def loaded(self) -> Loaded:
        """The model."""
        self.load()
        assert self._loaded is not None
        return self._loaded

    @property
    def images(self) -> Images:
        """The images."""
        self.load()
        assert self._images is not None
        return self._images

    @property
    def parts(self) -> int:
        """Into how many parts the images fall."""
        return math.ceil(len(self.images) / self.rows)

    def listing(self) -> str:
        """A number that stands for all images in their order, as hexadecimal digits."""
        number = hashlib.sha256()
        for item in self.images.items:
            number.update(self.images.source.where(item).encode("utf-8", "surrogateescape") + b"\n")
        return number.hexdigest()[:16]

    # -- encoding ------------------------------------------------------------------------------------------------------
    def part(self, reducers: tuple[Reducer, ...], unit: int) -> Features:
        """Features of the ``unit``-th :attr:`rows` images. The model is as before afterwards.

        Raises ``ValueError`` for images of different sizes in one batch, and for vectors that are not finite.
        """
        ids: list[int] = []
        vectors: list[Tensor] = []
        problems: list[Problem] = []
        places = range(unit * self.rows, min((unit + 1) * self.rows, len(self.images)))
        with patched(self.loaded.model, *reducers) if reducers else nullcontext():
            for start in range(0, len(places), self.batch):
                batch, broken = self.images.group(places[start : start + self.batch])
                problems += broken
                if batch is not None:
                    vectors.append(self._vectors(batch.x))
                    ids += batch.ids.tolist()
        made = torch.cat(vectors).numpy() if vectors else np.zeros((0, 0), np.float32)
        where = [self.images.source.where(self.images.items[i]) for i in ids]
        return Features(np.asarray(ids, np.int64), where, made.astype(np.float16) if self.half else made, problems)

    def _vectors(self, x: Tensor) -> Tensor:
        with inference(self.device, self.amp):
            out = features(self.loaded, x.to(self.device)).float()
        if not bool(out.isfinite().all()):
            raise ValueError(f"{self.model} gave NaN or infinite features{'; try another --amp' if self.amp else ''}")
        if self.normalize:
            out = torch.nn.functional.normalize(out, dim=-1)
        return out.cpu()

    def flops(self) -> tuple[int, int]:
        """FLOPs of one image: the stock model's, and with the methods, their own included."""
        x = next((x for i in range(len(self.images)) if isinstance(x := self.images.read(i), Tensor)), None)
        if x is None:
            first = "".join(f"\n  {p.path}: {p.reason}" for p in self._broken())
            raise ValueError(f"none of the images of {self.data} can be read:{first}")
        found = []
        for reducers in ((), self.reducers):
            with (
                patched(self.loaded.model, *reducers) if reducers else nullcontext(),
                torch.no_grad(),
                record(self.loaded.model) as trace,
            ):
                features(self.loaded, x[None].to(self.device))
            found.append(trace.flops)
        return found[0], found[1]

    def _broken(self) -> list[Problem]:
        return [p for i in range(min(5, len(self.images))) if isinstance(p := self.images.read(i), Problem)]
