"""FLOPs as ``torch.utils.flop_counter`` counts them: two per multiply-add, of the operators that really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["count_flops", "flop_counter", "flops_by_layer", "gmacs"]


class _Total:
    """Stands in for torch's module tracker. The total is all we need, and the tracker's hooks fail on views of
    parameters that a module makes under ``no_grad`` (timm's attention pooling)."""

    parents = frozenset({"Global"})
    is_bw = False

    def __enter__(self) -> _Total:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _attention_kernel(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the inference kernel of ``nn.MultiheadAttention``, which torch's counter takes for nothing: two
    projections, (N,C) to (N,3C) and (N,C) to (N,C), and two products with the attention map. Arguments are shapes."""
    b, n, c = query
    return 2 * b * n * c * (3 * c + c) + 2 * 2 * b * n * key[1] * c


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of fused attention on a CPU, which the counter of some releases of torch (2.14) takes for nothing."""
    return int(sdpa_flop_count(query, key, value))


KERNELS = {
    torch.ops.aten._native_multi_head_attention: _attention_kernel,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
}


def flop_counter() -> FlopCounterMode:
    """A fresh counter; use as a context manager, then ``get_total_flops()``."""
    counter = FlopCounterMode(display=False, custom_mapping=KERNELS)
    counter.mod_tracker = _Total()  # type: ignore[assignment]
    return counter


def count_flops(function: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call, without gradients."""
    counter = flop_counter()
    with torch.no_grad(), counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops())


@contextmanager
def flops_by_layer(blocks: Sequence[nn.Module], total: Callable[[], int]) -> Iterator[list[int]]:
    """Inside, the list gets the FLOPs of every call of one of ``blocks``, in the order in which they end.

    ``total`` says what was counted so far, of a counter that is running (``lambda: trace.flops`` of a trace).
    """
    began: list[int] = []
    out: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        began.append(total())

    def behind(module: nn.Module, args: Any, result: Any) -> None:
        out.append(total() - began.pop())

    handles = [h for b in blocks for h in (b.register_forward_pre_hook(before), b.register_forward_hook(behind))]
    try:
        yield out
    finally:
        for handle in handles:
            handle.remove()


def gmacs(flops: float) -> float:
    """Giga multiply-adds, the unit most papers call "GFLOPs"."""
    return flops / 2e9
