"""Seeing the queries of every layer of a language model for the time of one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, Call, listen
from tokenreduce.adapters.language.decoders import carries
from tokenreduce.core.undo import Undo

__all__ = ["watched"]


@contextmanager
def watched(text: nn.Module, watch: Callable[[int, Tensor], Any] | None) -> Iterator[None]:
    """``watch(layer, queries)`` for the queries (B,H,Q,d), behind their rotation, of every layer of ``text``; nothing
    where it is None. Raises ``ValueError`` for layers that hand no keywords to their attention."""
    if watch is None:
        yield
        return
    layers: Any = text.layers
    undo, copies = Undo((), text), {}  # type: ignore[var-annotated]
    calls: dict[int, Call] = {}

    def before(layer: Any, args: Any, kwargs: Any, index: int) -> Any:
        calls[index] = Call(kwargs.get("attention_mask"), record=True)
        return args, {**kwargs, CALL: calls[index]}

    try:
        for i, layer in enumerate(layers):
            if not carries(layer):
                raise ValueError(f"the attention of {type(layer).__name__} is not seen from outside; choose knorm")
            listen(layer.self_attn, undo, copies)
            undo.pre_hook(layer, functools.partial(before, index=i))
        yield
        for i, call in calls.items():
            assert call.queries is not None
            watch(i, call.queries)
    finally:
        undo.revert()
