"""Where in a tower a method acts: one site for every block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from tokenreduce.adapters.encoders.pixels import AtEntry
from tokenreduce.core.reducer import Reducer

__all__ = ["ON_BLOCK", "Site", "may_be_reduced", "may_reduce"]

#: Attribute of a patched block that holds its site.
ON_BLOCK = "_tokenreduce_site"


@dataclass(frozen=True)
class Site:
    """One block's place: its layer and the reducer that acts there, if any; ``entry`` is the method on pixels in front
    of the first. Frozen and picklable. ``where`` and ``needs`` are what the reducer says of itself, asked once: a
    reducer's settings never change."""

    layer: int
    depth: int
    prefix: int
    cls: bool
    reducer: Reducer | None = None
    rope: str | None = None
    label: str = ""
    entry: AtEntry | None = None
    leads: bool = False
    where: str | None = field(init=False, default=None)
    needs: tuple[str, ...] = field(init=False, default=())
    #: Whether nothing acts here or looks at what enters.
    quiet: bool = field(init=False, default=False)
    #: Whether it is the first block. A graph that asked for the number would be this block's alone.
    first: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.reducer is not None:
            object.__setattr__(self, "where", self.reducer.acting_position())
            object.__setattr__(self, "needs", self.reducer.required())
        object.__setattr__(self, "first", not self.layer)
        object.__setattr__(self, "quiet", self.reducer is None and self.entry is None and not self.leads)


def may_be_reduced(blocks: Iterable[nn.Module], x: Tensor, stock: int | None) -> bool:
    """Whether tokens ``x`` (B,N,C) without a state may be what a reducer in patched ``blocks`` left.

    ``stock`` is the number of tokens that every forward of the tower starts with, None where that depends on the image
    (then a reduced large image may have as many tokens as a small one). Methods with ``ragged`` may fill up to it.
    """
    acting = [reducer for reducer in _acting(blocks) if not reducer.rebuilds]  # whose tokens are all there again
    return bool(acting) and (x.shape[1] != stock or any(reducer.ragged for reducer in acting))


def may_reduce(blocks: Iterable[nn.Module]) -> bool:
    """Whether a reducer in patched ``blocks`` may do anything."""
    return bool(_acting(blocks))


def _acting(blocks: Iterable[nn.Module]) -> list[Reducer]:
    sites: list[Site] = [block.__dict__[ON_BLOCK] for block in blocks]
    reducers = [*(site.reducer for site in sites), *(site.entry.reducer for site in sites if site.entry is not None)]
    return [reducer for reducer in reducers if reducer is not None and not _keeps_all(reducer)]


def _keeps_all(reducer: Reducer) -> bool:
    keep = getattr(reducer, "keep", None)
    return isinstance(keep, float) and keep >= 1.0
