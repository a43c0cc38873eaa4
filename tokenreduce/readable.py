"""Whether Python may ask a tensor for its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["readable"]


def readable(values: Tensor) -> bool:
    """Whether Python may ask for the numbers in ``values``: not in a graph that is compiled or exported, and not inside
    ``torch.func.vmap``, where one tensor stands for many."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        if torch._C._functorch.is_batchedtensor(values):
            return False
        values = torch._C._functorch.get_unwrapped(values)
    return True
