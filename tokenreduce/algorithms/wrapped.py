"""Methods of the cache stage that sit on another one: its text, and the method that it names."""

from __future__ import annotations

import functools
from typing import Any

from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import build
from tokenreduce.core.registry import get_class, list_methods
from tokenreduce.core.specs import parse_spec

__all__ = ["OnScorer", "scorer"]


class OnScorer(CacheReducer):
    """A method that sits on the one that its field ``base`` names: it sees what that sees, and acts where that acts."""

    base: str
    keep: int | float
    what: str

    @property
    def inner(self) -> KeyScorer:
        """The method that ``base`` names, with this one's budget; raises ``ValueError`` as :func:`scorer`."""
        return scorer(self.base, self.name, self.keep, self.what)

    def required(self) -> tuple[str, ...]:
        return self.inner.required()

    def query_rows(self) -> int | None:
        return self.inner.query_rows()

    def acts_at(self, layer: int, depth: int) -> bool:
        return self.inner.acts_at(layer, depth)


@functools.lru_cache(maxsize=64, typed=True)  # keep=1 is one key, keep=1.0 all
def scorer(base: str, owner: str, keep: int | float, what: str) -> KeyScorer:
    """The method that ``base`` names ("snapkv", or with settings of its own "snapkv:window_size=16"), with the budget
    of the method ``owner`` that sits on it.

    Raises ``ValueError`` for a method that does not rank keys, or plans otherwise than by its ranking; for one that
    chooses again in decode; and for ``keep`` or ``what`` among its settings.
    """
    named = base.partition(":")[0].partition("@")[0].strip()
    if named not in list_methods(stage="cache"):
        raise ValueError(f"{owner}: base={base!r} is no method of the cache stage; choose {_known()}")
    try:
        kind = get_class(named, "cache")
        settings: dict[str, Any] = parse_spec(base, kind)[1]
    except ValueError as error:
        raise ValueError(f"{owner}: base={base!r}: {error}") from None
    if not issubclass(kind, KeyScorer) or kind.plan is not KeyScorer.plan:
        raise ValueError(f"{owner}: base={base!r} does not rank keys by one number each; choose {_known()}")
    for own in ("keep", "what"):
        if own in settings:
            raise ValueError(f"{owner}: the budget is {owner}'s own, give it there instead of {own} in base={base!r}")
    try:
        out = build(kind, {**settings, "keep": keep, "what": what})
    except ValueError as error:
        raise ValueError(f"{owner}: base={base!r}: {error}") from None
    assert isinstance(out, KeyScorer)
    if out.moment() != "layer" or out.every():
        raise ValueError(
            f"{owner}: base={base!r} does not choose once behind each layer's prefill, which is all that {owner} does; "
            f"choose {_known()}"
        )
    return out


def _known() -> str:
    kinds = {name: get_class(name, "cache") for name in list_methods(stage="cache")}
    known = (name for name, kind in kinds.items() if issubclass(kind, KeyScorer) and kind.plan is KeyScorer.plan)
    return ", ".join(known)
