"""How long the vision tower of an image/video language model runs, within whatever forward it is part of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokenreduce.measure.timing import synchronise

__all__ = ["CALLS", "tower_clock"]

#: What runs tower and projector in every family of transformers.
CALLS = ("get_image_features", "get_video_features")
_NONE = object()


@contextmanager
def tower_clock(inner: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every call of tower and projector of ``inner`` (a model with ``get_image_features``) inside the block,
    in order; one that runs within another counts with that. The model comes back as it was."""
    spent: list[float] = []
    before = {name: vars(inner).get(name, _NONE) for name in CALLS if callable(getattr(inner, name, None))}
    busy = False

    def timed(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return original(*args, **kwargs)
            busy = True
            synchronise(device)
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                synchronise(device)
                spent.append(time.perf_counter() - began)
                busy = False

        return call

    for name in before:
        vars(inner)[name] = timed(getattr(inner, name))
    try:
        yield spent
    finally:
        for name, was in before.items():
            if was is _NONE:
                del vars(inner)[name]
            else:
                vars(inner)[name] = was
