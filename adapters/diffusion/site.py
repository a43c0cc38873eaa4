"""What a patched block knows of its place, and what its modules are handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenreduce.core.diffusion_reducer import DiffusionReducer

__all__ = ["ON_BLOCK", "ON_MODULE", "DiffusionSite", "Map"]

ON_BLOCK = "_tokenreduce_site"
#: On spatial transformers and on modules of a block: whether the method acts there.
ON_MODULE = "_tokenreduce_acts"


@dataclass(frozen=True)
class DiffusionSite:
    """One block's place: which of the denoiser's it is, and the method that acts there. Frozen and picklable."""

    layer: int
    depth: int
    reducer: DiffusionReducer


class Map(NamedTuple):
    """What reaches a block with its call: the timestep, and (rows, columns) of the feature map, once they are known."""

    timestep: Any = None
    grid: tuple[int, int] | None = None
