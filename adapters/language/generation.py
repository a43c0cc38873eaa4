"""One generation of a language model with fewer tokens, and one forward of the model within it.

A generation travels with the calls of its layers as a keyword argument and, between forwards, as an attribute of the
cache object, so interleaved generations and threads never mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.state import State

__all__ = [
    "KEYWORD", "Forward", "Generation", "Positions", "attach_generation", "cache_as", "cache_in", "cache_of",
    "generation_of", "is_known",
]  # fmt: skip

#: Keyword under which a forward travels through the model's kwargs, and attribute of the cache between forwards.
KEYWORD = "tokenreduce_forward"
_ON_CACHE = "_tokenreduce_generation"


@dataclass
class Positions:
    """What the model counts: columns ``given`` to it so far, as its hooks have seen them, and, where positions are
    compact, by how much those of new tokens are less than the caller's, ``shift`` (B,1)."""

    given: int = 0
    shift: Tensor | None = None


@dataclass
class Generation:
    """What one call of ``generate`` has left of its prompt, from the first forward to the last: which ``columns`` every
    layer holds, what the model counts as ``positions``, and what each step remembers, its ``state``."""

    columns: Columns
    positions: Positions = field(default_factory=Positions)
    state: State = field(default_factory=State)

    def crop(self, left: int) -> None:
        """Forget all columns but the first ``left``."""
        columns, positions = self.columns, self.positions
        if left < columns.length and positions.shift is not None and columns.cut_at(-1) is not None:
            kept = columns.slots_behind(-1, left, columns.length)
            positions.shift = positions.shift - (columns.length - left - kept)
        columns.crop(left)
        self.state.crop(left)

    def reorder(self, beams: Tensor) -> None:
        """Follow beams of one prompt: what is remembered of row i is what row ``beams[i]`` did."""
        rows = beams.to(self.columns.visual.device)
        self.columns.reorder(rows)
        self.state.reorder(rows)


@dataclass(frozen=True)
class Forward:
    """One forward of the model within a generation: its prompt, a decode step, or a later turn of several tokens (those
    of a draft that is verified, too)."""

    generation: Generation
    phase: Literal["prefill", "decode", "turn"]
    #: Behind the prompt: tokens per sample that come new, and columns that there were before.
    new: int = 0
    past: int = 0
    #: Whether the caller says for every new token what it sees (a 4-D mask on a cache that grows).
    masked: bool = False
    #: Rows of the batch where one new token each sees all that is cached, so that layers need nothing; 0 elsewhere.
    quiet: int = 0
    #: Whether layers behind one cut show the same slots: no cache of theirs forgets any, or has room for more.
    even: bool = False
    #: What is known of this forward alone, and made for its layers together.
    state: State = field(default_factory=State)

    @staticmethod
    def behind(generation: Generation, new: int, past: int, cache: Any, masked: bool = False) -> Forward:
        """A forward on a ``cache`` that holds the prompt."""
        even = not any(_forgets(layer) for layer in cache.layers)
        if new > 1:
            return Forward(generation, "turn", new, past, masked, even=even)
        rows = len(generation.columns.visual) if even and not masked and generation.columns.plain else 0
        return Forward(generation, "decode", new, past, masked, rows, even)

    @property
    def prefill(self) -> bool:
        return self.phase == "prefill"

    @property
    def columns(self) -> Columns:
        return self.generation.columns


def _forgets(layer: Any) -> bool:
    """Whether a layer of a cache shows other slots than those that are filled."""
    return hasattr(layer, "max_cache_len") or getattr(layer, "is_sliding", False)


# -- how it travels --------------------------------------------------------------------------------------------------
def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def cache_as(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of ``model``, under the name that its release knows."""
    known = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output carries, under either of its names."""
    return output["cache" if "cache" in output else "past_key_values"]


def generation_of(cache: Any) -> Generation | None:
    """The generation that a cache belongs to."""
    return getattr(cache, _ON_CACHE, None)


def is_known(cache: Any) -> bool:
    """Whether a patched model has seen ``cache`` before."""
    return hasattr(cache, _ON_CACHE)


def attach_generation(cache: Any, generation: Generation | None) -> None:
    setattr(cache, _ON_CACHE, generation)
