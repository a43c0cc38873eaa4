"""FitPrune (arXiv 2409.10197): in every layer, the visual tokens go that image and text attend to least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import keep_best, paid_most, question, shrink, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FitPrune"]

_KEEP = 0.22


@dataclass(frozen=True)
class FitPrune(
    Reducer, name="fitprune", stage="language", needs=("attention", "middle"), paper="2409.10197", title="FitPrune"
):
    """FitPrune: inside layers, between attention and MLP, tokens leave by a scheme of numbers per layer.

    With M the maximum over heads of the layer's attention, a visual token's score is the mean of M over the visual
    queries times its sum over the text queries behind the image; the lowest go. Rows that leave are not seen by that
    layer's MLP and by later layers. A layer that deletes nothing computes nothing. The last layer deletes nothing,
    which would save nothing.

    A baseline of benchmarks, and a slow one: rows of all visual and text queries are computed again in every layer that
    deletes; never more than 64 at a time. The official fit of the scheme takes the intersection of both criteria where
    this product is used at run time; its numbers are in the authors' repository, and
    :func:`tokenreduce.measure.scheme.delete_scheme` fits others.

    Args:
        deletes: tokens that each layer deletes, from layer 0 on, of ``tokens`` visual ones: an official scheme. For
            other numbers of tokens or layers the share that is gone at each depth is interpolated, which is an
            approximation of ours.
        tokens: visual tokens that ``deletes`` was fitted on.
        keep: instead of ``deletes``, visual tokens left behind the last layer, a count or a ratio, reached by equal
            ratios over the layers, which is ours; 0.22 without any, as the scheme for 60 % of the FLOPs leaves.

    Decisions: padded rows do not vote; where no text is behind the image, the image's own rows decide; ties go to the
    lower index; at least one visual token stays.

    Raises ``ValueError`` for other values, and both ``deletes`` and ``keep``. Patching refuses layers that do more than
    add the MLP to their stream.
    """

    deletes: tuple[int, ...] | None = None
    tokens: int = 576
    keep: int | float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.deletes, Sequence) and not isinstance(self.deletes, str):
            object.__setattr__(self, "deletes", tuple(self.deletes))
        check_keep(self.keep)
        check_count(self.tokens, "tokens", 1)
        if self.deletes is None:
            return
        if self.keep is not None:
            raise ValueError("give deletes or keep, not both")
        if not isinstance(self.deletes, tuple) or not self.deletes:
            raise ValueError(f"deletes is a tuple with the tokens that each layer deletes, not {self.deletes!r}")
        for number in self.deletes:
            check_count(number, "deletes")
        if sum(self.deletes) >= self.tokens:
            raise ValueError(f"deletes are {sum(self.deletes)} of {self.tokens} tokens; at least one must stay")

    def acts_at(self, layer: int, depth: int) -> bool:
        if layer == 0 or (self.keep == 1.0 and isinstance(self.keep, float)):
            return False
        if self.deletes is None:
            return True
        return self._gone(layer, depth) > self._gone(layer - 1, depth)

    def _gone(self, layer: int, depth: int) -> float:
        """How many of ``tokens`` are gone before ``layer`` by the scheme."""
        assert self.deletes is not None
        done = [0, *torch.tensor(self.deletes).cumsum(0).tolist()]
        at = layer * len(self.deletes) / depth
        below = min(int(at), len(self.deletes) - 1)
        return float(done[below] + (at - below) * (done[below + 1] - done[below]))

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual, first = visual_of(evidence), evidence.visual_entry()
        if self.deletes is None:
            keep = _KEEP if self.keep is None else self.keep
            wanted = shrink(keep, first, evidence.layer - 1, max(evidence.depth - 1, 1))
        else:
            gone = first.double() * self._gone(evidence.layer, evidence.depth) / self.tokens
            wanted = (first - (gone + 0.5).long()).clamp(min=1)
        if bool((wanted >= visual.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.x)
        return keep_best(self.score(evidence), wanted, evidence)

    def score(self, evidence: LanguageEvidence) -> Tensor:
        """(B,N) product of what visual and text queries pay to every token."""
        visual = visual_of(evidence)
        text = question(visual, evidence.valid)
        own = paid_most(evidence, visual) / visual.sum(1, keepdim=True).clamp(min=1)
        cross = torch.where(text.any(1, keepdim=True), paid_most(evidence, text), 1.0)
        return finite(own * cross, evidence)
