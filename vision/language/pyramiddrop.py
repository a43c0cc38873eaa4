"""PyramidDrop (arXiv 2410.17247): fewer visual tokens in each stage of the language model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.algorithms.sequence import check_stages, keep_best, shrink, stages_of
from tokenreduce.core.budget import check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["PyramidDrop"]

_SHARES = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class PyramidDrop(
    Reducer, name="pyramiddrop", stage="language", needs=("ahead", "attention"), paper="2410.17247", title="PyramidDrop"
):
    """PyramidDrop: at each boundary between stages, keep the visual tokens that the last prompt token attends to most.

    The score at boundary L is the softmaxed attention (over the whole sequence, float32) that layer L itself would pay
    from the last real token to each visual token before anything is dropped there, averaged over heads; grouped key
    heads are repeated. Layer L is the first that sees fewer tokens. Counts are shares of the visual tokens at the
    entry of the language model, rounded down as published, so that they do not depend on earlier stages. Decoding
    makes no new choice.

    Args:
        layer_list: boundaries, 0-based and ascending; by default the depth is cut into stages of equal length
            (8, 16, 24 of 32 layers).
        image_token_ratio_list: share of the visual tokens left behind each boundary, not increasing; (0.5, 0.25,
            0.125) when neither this nor ``keep`` is given.
        keep: instead of ``image_token_ratio_list``: visual tokens left behind the last boundary, a count or a ratio of
            those at the entry, reached by equal ratios (0.125 gives the published shares).

    Decisions: at least one visual token stays where the published rounding leaves none; kept tokens keep their
    original positions, as with every language-stage method here (the published code renumbers them).

    Raises ``ValueError`` for bad shares, lists of different lengths, both ``keep`` and shares, and boundaries that the
    model does not have (or fewer layers than stages).
    """

    layer_list: tuple[int, ...] | None = None
    image_token_ratio_list: tuple[float, ...] | None = None
    keep: int | float | None = None

    def __post_init__(self) -> None:
        for name in ("layer_list", "image_token_ratio_list"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_keep(self.keep)
        check_stages(self.layer_list, "layer_list", 1)
        shares = self.image_token_ratio_list
        if shares is not None:
            if self.keep is not None:
                raise ValueError("give image_token_ratio_list or keep, not both")
            numbers = isinstance(shares, tuple) and all(
                isinstance(s, int | float) and not isinstance(s, bool) and 0 < s <= 1 for s in shares
            )
            if not numbers or not shares or any(a < b for a, b in itertools.pairwise(shares)):
                raise ValueError(
                    f"image_token_ratio_list is a tuple of shares in (0, 1] that do not increase, such as {_SHARES}, "
                    f"not {shares!r}"
                )
        if self.keep is None and self.layer_list is not None and len(self.layer_list) != len(shares or _SHARES):
            raise ValueError(
                f"layer_list has {len(self.layer_list)} boundaries and image_token_ratio_list "
                f"{len(shares or _SHARES)} shares; give one share for each boundary"
            )

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.layer_list is not None:
            return stages_of(self.layer_list, depth, "layer_list")
        stages = len(self.image_token_ratio_list or _SHARES) + 1
        if depth < stages:
            raise ValueError(f"{stages} stages need as many layers, not {depth}; give layer_list")
        return tuple(depth * i // stages for i in range(1, stages))

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def plan(self, evidence: LanguageEvidence) -> Plan:
        layers, first = self._layers(evidence.depth), evidence.visual_entry()
        stage = layers.index(evidence.layer)
        if self.keep is not None:
            wanted = shrink(self.keep, first, stage, len(layers))
        else:
            wanted = ((self.image_token_ratio_list or _SHARES)[stage] * first.double()).long().clamp(min=1)
        return keep_best(evidence.attention(evidence.last())[:, :, 0].mean(1), wanted, evidence)
