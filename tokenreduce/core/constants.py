"""Index tensors that depend on shapes alone, made once for each shape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tokenreduce.core.readable import readable

__all__ = ["first_rows", "positions"]


def positions(n: int, like: Tensor) -> Tensor:
    """(n,) the numbers from 0 on, on the device of ``like``; not to be written to."""
    return _positions(n, like.device) if _plain(like) else torch.arange(n, device=like.device)


def first_rows(batch: int, n: int, like: Tensor) -> Tensor:
    """(batch,1) number of the first of every sample's ``n`` rows, when the samples lie one behind the other; not to be
    written to."""
    if _plain(like):
        return _first_rows(batch, n, like.device)
    return torch.arange(0, batch * n, n, device=like.device).unsqueeze(1)


def _plain(like: Tensor) -> bool:
    """Whether what is made now may be used in another run: graphs and fake tensors have constants of their own."""
    return type(like) is Tensor and readable(like)


@functools.lru_cache(maxsize=512)
def _positions(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be kept for a backward pass
        return torch.arange(n, device=device)


@functools.lru_cache(maxsize=512)
def _first_rows(batch: int, n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, batch * n, n, device=device).unsqueeze(1)
