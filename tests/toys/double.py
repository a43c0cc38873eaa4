"""Toys in double precision, where a difference is either a fault or nothing.

Models turn to float32 by themselves in norms, softmax, routers and linear attention. Inside :func:`in_double` they
stay in float64, so that a model which multiplies rounding (mixtures of experts with random weights do) can be held to a
bound that no fault would keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import tokenreduce as tr
from toys.checks import plain
from toys.oracles import Stock, stock


class _Wide(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@contextmanager
def in_double(name: str) -> Iterator[Stock]:
    """A toy of its own in float64, and casts to float32 that go there, too."""
    model, inputs = plain(name)
    tr.describe(model)  # reads in float32 how layers compute, and remembers it
    model.set_experts_implementation("eager")  # grouped products know no float64
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with _Wide():
        yield stock(model.double(), inputs)
