"""In what kind of run a function is: whether Python may ask a tensor for its numbers, or for its size as a number,
and whether ONNX is being made."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["length", "readable", "to_onnx"]


def readable(values: Tensor) -> bool:
    """Whether Python may ask for the numbers in ``values``: not in a graph that is made by tracing, and not
    inside ``torch.func.vmap``, where one tensor stands for many."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        if torch._C._functorch.is_batchedtensor(values):
            return False
        values = torch._C._functorch.get_unwrapped(values)
    return True


def to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is tracing, which knows fewer operations than PyTorch has."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def length(x: Tensor) -> int:
    """Number of tokens N of ``x`` (B,N,...); ``torch.jit.trace`` would answer with a tensor."""
    n = x.shape[1]
    return n if type(n) is int or not torch.jit.is_tracing() else int(n)
