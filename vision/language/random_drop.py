"""Random pruning inside the language model: the baseline that every method there has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.algorithms.baseline import draw
from tokenreduce.algorithms.sequence import keep_best, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["RandomVisual"]


@dataclass(frozen=True)
class RandomVisual(
    Reducer, name="random@language", stage="language", needs=(), title="Random pruning inside the language model"
):
    """Random pruning: before one layer, visual tokens stay by a draw; order and positions stay.

    The draw is a hash of ``seed``, the layer, a token's place among the sample's visual tokens and their coarse
    content, so that text, padding, other samples and the device change nothing: see
        :func:`tokenreduce.algorithms.baseline.draw`.

    Args:
        layer: 0-based first layer that sees fewer tokens, as in FastV.
        keep: visual tokens that stay, a count or a ratio, rounded half up.
        seed: another seed, another draw.

    Raises ``ValueError`` for a negative ``layer`` or ``seed``, a layer that the model does not have, and a bad
    ``keep``.
    """

    layer: int = 2
    keep: int | float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.layer, "layer")
        check_keep(self.keep)
        if self.keep is None:
            raise ValueError("keep is a number of tokens (int >= 1) or a ratio (float in (0, 1]), not None")
        check_count(self.seed, "seed")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        return keep_best(draw(evidence, self.seed, visual_of(evidence)), self.keep, evidence)
