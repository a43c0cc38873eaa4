"""What is remembered of a generation in whose decode steps a method chooses again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import implementation
from tokenreduce.adapters.language.generation import Run
from tokenreduce.core.reducer import Reducer

__all__ = ["Again", "Aside", "Pick", "Site", "check_later", "columns_of_slots", "real_columns"]

#: Steps that are remembered for when a cache is cropped: more than drafts have tokens.
REMEMBERED = 32


@dataclass(frozen=True)
class Site:
    """A decoder layer in decode: the method that chooses before it, if any; the layer ``since`` which the choice that
    holds here was made; and whether the next layer's method reads this layer's attention."""

    method: Reducer | None
    since: int | None
    reads: bool
    depth: int


@dataclass
class Aside:
    """Features (B,E,C) of tokens that went before a layer, by their place at the entry of the language model; ``here``
    (B,E) marks those that did not come back yet."""

    x: Tensor
    here: Tensor


@dataclass
class Again:
    """What decode steps of one generation remember. Keys of the dictionaries are layers where a method chooses, which
    are those ``at``."""

    at: tuple[int, ...] = ()
    #: The steps before, the last one last, as many as drafts may take back: the new token's column, its attention
    #: (B,L), mean over heads, and which columns it left.
    earlier: dict[int, list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)
    #: (B,S) column of every cache slot from the layer on, -1 for none; only once a token came back there.
    slots: dict[int, Tensor] = field(default_factory=dict)
    aside: dict[int, Aside] = field(default_factory=dict)
    #: Rotary tables of the prompt's columns.
    tables: tuple[Tensor, ...] | None = None

    def revived_at(self, layer: int) -> int | None:
        """The layer since which the choice that holds in ``layer`` was made, where tokens came back."""
        since = max((i for i in self.at if i <= layer), default=None)
        return since if since in self.slots else None

    def crop(self, left: int, slots: dict[int, int]) -> None:
        """Forget columns from ``left`` on; ``slots`` of those that are known stay, from each layer on."""
        self.slots = {k: self.slots[k][:, :n] for k, n in slots.items()}
        self.earlier = {k: [s for s in steps if s[0] < left] for k, steps in self.earlier.items()}

    def reorder(self, rows: Tensor) -> None:
        """Follow beams: row i is what row ``rows[i]`` was."""
        self.earlier = {k: [(c, a[rows], s[rows]) for c, a, s in steps] for k, steps in self.earlier.items()}
        self.slots = {k: s[rows] for k, s in self.slots.items()}
        self.aside = {k: Aside(a.x[rows], a.here[rows]) for k, a in self.aside.items()}


@dataclass
class Pick:
    """The choice that holds from a layer on, in one step: ``live`` (B,C) of all columns. Tokens that came back,
    ``back`` (B,R) columns (-1: none), are in front of the new one, with rotary ``tables`` of all. ``before`` has the
    columns of slots as they were."""

    live: Tensor
    back: Tensor
    tables: tuple[Tensor, ...] | None
    before: Tensor | None
    #: Layers with the same slots share (take, mask, columns).
    made: dict[int, tuple[Tensor | None, Tensor | None, Tensor]] = field(default_factory=dict)


def check_later(acting: list[list[Reducer]], windows: list[int | None], layers: Any) -> None:
    """Raise ``ValueError`` for methods whose decode steps do not go together, or not with the model's attention."""
    every = {id(r): r for here in acting for r in here}
    again = [r for r in every.values() if r.decode_mode()]
    if len(again) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in again)} both choose again in decode; choose one")
    if not again:
        return
    first = next(i for i, here in enumerate(acting) if again[0] in here)
    if any(w is not None for w in windows[max(first - 1, 0) :]):
        raise ValueError(
            f"{again[0].spec()} chooses again in decode, which layers with sliding windows are not supported for"
        )
    if again[0].decode_mode() != "revive":
        return
    others = [r.spec() for r in every.values() if r is not again[0]]
    if others:
        raise ValueError(
            f"{again[0].spec()} brings tokens back in decode, which {' and '.join(others)} would drop for good in a "
            f"layer behind; set revive=false or leave that out"
        )
    name = implementation(layers[first].self_attn)
    if "flash" in name:
        raise ValueError(
            f"{again[0].spec()} brings tokens back in decode, in steps of several tokens at old positions, for which "
            f"{name} has no mask; set revive=false or call model.set_attn_implementation('sdpa')"
        )


def columns_of_slots(run: Run, layer: int, since: int | None, slots: int) -> Tensor:
    """(B,S) column of every one of the first ``slots`` of a layer's cache; -1 for padding and for slots that hold
    none. ``since`` is the layer whose method brings tokens back there, if any."""
    assert run.again is not None
    known = None if since is None else run.again.slots.get(since)
    if known is not None:
        if known.shape[1] != slots:
            raise ValueError(
                f"the cache of layer {layer} holds {slots} tokens where {known.shape[1]} were put; crop the cache as a "
                f"whole (cache.crop), not its layers"
            )
        return known
    cut, (b, length), device = run.cut_at(layer), run.visual.shape, run.visual.device
    if cut is None:
        columns, seen = torch.arange(length, device=device).expand(b, -1), run.mask
    else:
        columns, seen = cut.index, cut.seen
    if seen is not None:
        columns = columns.masked_fill(~seen, -1)
    behind = torch.arange(length, length + slots - columns.shape[1], device=device).expand(b, -1)
    return torch.cat([columns, real_columns(run, behind)], 1)


def real_columns(run: Run, columns: Tensor) -> Tensor:
    """Columns (B,M) behind the prompt, -1 where a later turn was padded."""
    if run.later is None:
        return columns
    at = columns - run.length
    known = at < run.later.shape[1]
    padding = ~run.later.gather(1, at.clamp(max=run.later.shape[1] - 1))
    return columns.masked_fill(known & padding, -1)
