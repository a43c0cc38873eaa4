"""MustDrop (arXiv 2411.10803), decode: early layers forget the visual tokens that its later layers went without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.algorithms.sequence import check_stages, stages_of
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["MustDropCache"]


@dataclass(frozen=True)
class MustDropCache(CacheReducer, name="mustdrop-cache", paper="2411.10803", title="MustDrop, decode"):
    """MustDrop in decode: behind the prompt, the layers between its cuts keep only what came out of the last cut.

    Methods inside the language model leave every layer the visual keys that it saw: all of them in the first layers,
    the survivors of the last cut in the last ones. From the first pruning layer on, the caches are reduced to the
    visual tokens that the last layer holds; the layers in front of it keep their whole prompt, and text stays.
    Nothing is evicted while decoding. ``mustdrop+mustdrop-cache`` are the method's second and third phase;
    ``mustdrop-merge`` is its first. It goes with every other method of the language stage, and without one it does
    nothing, since the last layer then holds everything.

    Args:
        pruning_layers: as in ``mustdrop``: 0-based layers, (2, 6, 10, 14) of 32 and the same places in other depths
            by default. Only the first of them matters here: it ran on the whole prompt, as those before it did, and
            is the first whose cache is thinned.

    Keys keep their original positions and rotations, and the model counts on from the true length; in the published
    code a decoded token takes the length of each layer's cache as its position, so that a query can stand before some
    of its keys. A token survives where any head of the last layer holds it. The published code is for 32 layers.

    Raises ``ValueError`` for layers that the model does not have, and for layers that hold different numbers of slots
    without their columns.
    """

    pruning_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_stages(self.pruning_layers, "pruning_layers", 0)

    def moment(self) -> str:
        return "prompt"

    def decide(self, summaries: Sequence[CacheEvidence]) -> list[Plan]:
        if len({s.n for s in summaries}) > 1 and not all(s.located for s in summaries):
            raise ValueError(
                "layers hold different numbers of slots, and which tokens these are is not known: give columns=... to "
                "the evidence of every layer"
            )
        last = max(summaries, key=lambda s: s.layer)
        return [keep_slots(self._stay(s, last), s) for s in summaries]

    def _stay(self, evidence: CacheEvidence, last: CacheEvidence) -> Tensor:
        """(B*Hkv,N) bool: the slots of a layer that stay, given the ``last`` layer."""
        if evidence.layer < self._first(evidence.depth):
            return evidence.there
        columns, held = evidence.unfold(evidence.columns), last.unfold(last.columns)
        there = last.unfold(last.there)
        alive = torch.stack([torch.isin(columns[b], held[b][there[b]]) for b in range(evidence.batch)])
        return ~evidence.visual | alive.flatten(0, 1)

    def _first(self, depth: int) -> int:
        if self.pruning_layers is not None:
            return stages_of(self.pruning_layers, depth, "pruning_layers")[0]
        return max(0, min((2 * depth + 16) // 32, depth - 2))
