"""What a vision tower made of a batch, kept for all methods that look at the same of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenreduce.adapters.language.families import TOWER
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import reducers_of
from tokenreduce.patching import describe

__all__ = ["Shared"]


@dataclass(frozen=True)
class Shared:
    """``remake``, run once for all methods that look at the same of the tower's outputs."""

    remake: Callable[[Any], dict[str, Any]]
    kept: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, model: Any) -> dict[str, Any]:
        sees = _sees(model, reducers_of(model))
        if sees is None:
            return self.remake(model)
        if sees not in self.kept:
            self.kept[sees] = self.remake(model)
        return self.kept[sees]


def _sees(model: Any, reducers: Sequence[Reducer]) -> Any:
    """What these methods make of a tower's outputs and look at in it; None where they act inside it."""
    if any(r.stage == "encoder" for r in reducers):
        return None
    watched = any(r.stage == "projector" or r.tower_blocks() or {"frames", *TOWER} & {*r.required()} for r in reducers)
    more = {"head", "pixels"} & {need for r in reducers for need in r.required()}
    if any("head" in r.optional() for r in reducers) and "head" in describe(model).language.projector:
        more.add("head")
    return watched, frozenset(look for r in reducers for look in r.tower_blocks()), frozenset(more)
