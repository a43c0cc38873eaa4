"""A vision transformer found inside a model, and methods put into its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenreduce.adapters.encoders.frames import check_merging_frames
from tokenreduce.adapters.encoders.pixels import at_entry
from tokenreduce.adapters.encoders.rebuilding import check_rebuilding
from tokenreduce.adapters.encoders.site import ON_BLOCK, Site
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.core.reducer import Reducer

__all__ = ["Tower", "attach_tower", "sites_for"]


@dataclass(frozen=True)
class Tower:
    """One vision transformer found inside a model."""

    name: str  # path inside the patched model, "" for the model itself
    module: nn.Module
    family: str
    blocks: tuple[nn.Module, ...]
    classes: dict[type, type]  # block class -> patched class
    prefix: int
    cls: bool
    grid: tuple[int, ...] | None  # (rows, columns), or (frames, rows, columns) of a video encoder
    evidence: tuple[str, ...]
    rope: str | None = None
    resizes: bool = True  # whether the model takes smaller images, for methods that act on the input
    hands: str = "own"  # who reads the tokens behind it, see tokenreduce.adapters.encoders.readers
    std: tuple[float, ...] | None = None  # by what channels are divided in front of it, where that is known
    cell: int = 1  # patches along a side of what becomes one token behind it, for methods on pixels

    @property
    def tokens(self) -> int | None:
        """Tokens at the entry for the model's own image size, prefix included."""
        return None if self.grid is None else self.prefix + math.prod(self.grid)


def sites_for(tower: Tower, reducers: tuple[Reducer, ...]) -> list[Site]:
    """One site per block. Raises ``ValueError`` where a reducer does not fit or two act in one layer."""
    depth = len(tower.blocks)
    check_rebuilding(reducers, depth)
    check_merging_frames(reducers)
    base = Site(0, depth, tower.prefix, tower.cls, None, tower.rope, tower.name)
    sites = []
    for layer in range(depth):
        acting = [r for r in reducers if r.acting_position() != "input" and r.acts_at(layer, depth)]
        if len(acting) > 1:
            names = " and ".join(r.spec() for r in acting)
            raise ValueError(
                f"{names} both act in layer {layer}; give them different layers "
                "(for instance r=[8,8,0,0] and layers=[2])"
            )
        sites.append(replace(base, layer=layer, reducer=acting[0] if acting else None))
    for reducer in reducers:
        missing = [n for n in reducer.required() if n not in tower.evidence]
        if missing:
            raise ValueError(
                f"{reducer.name} needs {', '.join(missing)}, which {tower.family} cannot give "
                f"(it gives {', '.join(tower.evidence)}); choose another method, "
                "tr.describe(model) lists those that fit"
            )
    sites = [
        replace(site, leads=behind.reducer is not None and behind.reducer.rebuilds)
        for site, behind in zip(sites, [*sites[1:], base], strict=True)
    ]
    sites[0] = replace(sites[0], entry=at_entry(reducers, tower.std, tower.family, tower.cell))
    return sites


def attach_tower(tower: Tower, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Swap the classes of a tower's blocks. Raises ``TypeError`` for block classes that the family does not know."""
    sites = sites_for(tower, reducers)
    for block in tower.blocks:
        if type(block) not in tower.classes:
            known = ", ".join(sorted(c.__name__ for c in tower.classes))
            raise TypeError(f"{tower.family}: block class {type(block).__name__} is not supported; supported: {known}")
        refuse_own(block)
        refuse_patched(type(block))
    for block, site in zip(tower.blocks, sites, strict=True):
        undo.set(block, ON_BLOCK, site)
        undo.swap_class(block, tower.classes[type(block)])
