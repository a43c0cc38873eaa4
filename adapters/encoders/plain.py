"""Running a patched tower as if it were not, to see what the model around it does with tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from tokenreduce.core.mixing import parts

__all__ = ["MayBePlain", "plainly"]

_PLAIN: ContextVar[bool] = ContextVar("tokenreduce_plain", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Blocks with :class:`MayBePlain` compute as their library wrote them."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


class MayBePlain(nn.Module):
    """Mixin in front of patched blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _PLAIN.get():
            return _stock(type(self)).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _stock(kind: type) -> Any:
    """The class of a library that a patched block's class was made of."""
    own = (c for c in kind.__mro__ if not c.__module__.startswith("tokenreduce.") and parts(c) == (c,))
    return next(c for c in own if "forward" in vars(c))
