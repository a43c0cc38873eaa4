"""How reductions are called in tables, pictures and reports: their settings, and always the budget that they ran at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from tokenreduce.core.reducer import Reducer
from tokenreduce.core.specs import format_spec

__all__ = ["label_of"]

#: What stands for a budget where ``keep`` is left to the method; without any of these it is the published one.
OTHER_BUDGETS = ("r", "ratio", "base_keep_rate", "sample_ratio", "keep_rate", "cost", "scale", "every", "frames")


def label_of(reducers: Reducer | Iterable[Reducer], names: Iterable[str] | None = None) -> str:
    """The spec of ``reducers``, joined by ``+``, with ``keep`` also where it has its default; ``names`` stand for
    theirs (``random@projector``). :func:`tokenreduce.parse` reads it back.

    >>> from tokenreduce import FastV, ToMe
    >>> label_of([FastV(layer=3), ToMe()])
    'fastv:layer=3,keep=0.5+tome:r=0'
    """
    some = [reducers] if isinstance(reducers, Reducer) else list(reducers)
    called = [r.name for r in some] if names is None else list(names)
    return "+".join(_label(r, name) for r, name in zip(some, called, strict=True))


def _label(reducer: Reducer, name: str) -> str:
    changed = reducer._changed()
    known = [f.name for f in fields(reducer)]
    shown = {"keep"} if getattr(reducer, "keep", None) is not None else set()
    if not shown and not changed and "keep" in known:
        shown = {next((b for b in OTHER_BUDGETS if b in known), "keep")}
    return format_spec(name, {k: getattr(reducer, k) for k in known if k in changed or k in shown})
