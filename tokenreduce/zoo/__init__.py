"""Small trained models that ship with the package, so that accuracy is real without a download.

>>> import tokenreduce as tr
>>> tr.zoo.load("digits-vit").card["accuracy"]          # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from tokenreduce.zoo import weights

__all__ = ["ZooModel", "export", "load", "names"]


@dataclass(frozen=True)
class ZooModel:
    """A trained model: ``model`` (eval), ``transform`` (PIL image to tensor), class ``labels`` and its ``card``."""

    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    labels: tuple[str, ...]
    card: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], nn.Module]
    accuracy: Callable[[nn.Module], float]
    transform: Callable[[], Callable[[Image.Image], torch.Tensor]]
    labels: tuple[str, ...]
    extra: str


def _digits() -> _Entry:
    from tokenreduce.zoo import digits
    from tokenreduce.zoo.photo import DigitTransform

    return _Entry(digits.build, digits.accuracy, DigitTransform, tuple("0123456789"), "bench")


_ENTRIES: dict[str, Callable[[], _Entry]] = {"digits-vit": _digits}


def names() -> list[str]:
    """Names that :func:`load` knows."""
    return sorted(_ENTRIES)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"no embedded model {name!r}; there are: {', '.join(names())}")
    return _ENTRIES[name]()


def _build(name: str, entry: _Entry) -> nn.Module:
    try:
        return entry.build()
    except ImportError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'tokenreduce[{entry.extra}]'") from error


def load(name: str, *, device: torch.device | str = "cpu", folder: Path = weights.FOLDER) -> ZooModel:
    """A trained model by name, in eval mode and float32.

    Raises ``ValueError`` for an unknown name, ``OSError`` for missing or damaged weights (checked by sha256) and
    ``ImportError`` naming the extra when its library is missing.
    """
    entry = _entry(name)
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are thrown away: leave the user's random numbers alone
        model = _build(name, entry)
    card = weights.load(model, name, folder)
    return ZooModel(model.eval().to(device), entry.transform(), entry.labels, card)


def export(model: nn.Module, name: str, card: Mapping[str, Any], *, folder: Path = weights.FOLDER) -> dict[str, Any]:
    """Write a trained ``model`` as the embedded weights of ``name`` and return the complete card.

    The weights are rounded to fp16; ``accuracy`` in the card is measured after rounding, on held-out data. ``card``
    holds what training knows (steps, minutes, command). Raises ``ValueError`` for an unknown name.
    """
    entry = _entry(name)
    rounded = copy.deepcopy(model).half().float()
    facts = {**card, "accuracy": entry.accuracy(rounded)}
    weights.save(rounded, name, facts, folder)
    return weights.read_card(name, folder)
