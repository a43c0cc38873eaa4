"""What the vision tower of vLLM's own Qwen3-VL saw, as :mod:`tokenreduce.adapters.language.projector.tower` tells it of
the library's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenreduce.adapters.language.families import Vision
from tokenreduce.adapters.language.projector.seen import WATCHING, Encoded, PackedCall
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import resolve
from tokenreduce.core.undo import Undo

__all__ = ["Tower", "watch_tower"]


@dataclass(frozen=True)
class Tower:
    """A tower whose ``blocks`` tell queries and keys."""

    vision: Vision
    blocks: tuple[int, ...]

    @contextmanager
    def watched(self, grids: Tensor) -> Iterator[Encoded]:
        """Collect what a call for images of ``grids`` (images,3) patches sees inside."""
        seen = Encoded(self.vision, self.blocks, tower_kwargs={"grid_thw": grids})
        token = WATCHING.set(seen)
        try:
            yield seen
        finally:
            WATCHING.reset(token)


def watch_tower(visual: Any, reducer: Projector, undo: Undo) -> Tower:
    """Let the blocks of ``visual`` that ``reducer`` looks at tell what they see. Raises ``ValueError`` for a block that
    is not there."""
    blocks = tuple(getattr(visual, "blocks", ()))  # none where an engine takes neither images nor videos
    depth = len(blocks)
    vision = Vision((visual,), (blocks,), None, "packed", False, depth - 1, videos=True, given=("tower",))
    wanted = tuple(sorted({resolve(look, depth, depth - 1) for look in reducer.tower_blocks()})) if depth else ()
    for block in wanted:
        undo.pre_hook(blocks[block].attn.attn, functools.partial(_watch, block=block))
    return Tower(vision, wanted)


def _watch(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, block: int) -> None:
    """Pre-hook on a block's attention: its queries and keys (1,P,H,d) behind RoPE, of this rank's heads. Every frame is
    a sequence of its own, so there are no windows."""
    seen = WATCHING.get()
    if seen is not None:
        q, k = (kwargs[name].detach()[0].transpose(0, 1) for name in ("query", "key"))
        seen.calls[block] = PackedCall(q, k, None)
