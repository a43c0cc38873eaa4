"""Random pruning before the language model: the baseline that every projector method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.algorithms.baseline import draw
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Prune

__all__ = ["RandomTokens"]


@dataclass(frozen=True)
class RandomTokens(Projector, name="random@projector", title="Random pruning before the language model"):
    """Random pruning: tokens of the whole image, all its views together, stay by a draw; raster order.

    The draw is a hash of ``seed``, the token's place and the image's own coarse content, so that it does not depend on
    the batch, the device or what was drawn before: see :func:`tokenreduce.algorithms.baseline.draw`.

    Args:
        keep: visual tokens of every image that stay, a count or a ratio.
        seed: another seed, another draw.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for a negative ``seed`` and other bad settings.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.seed, "seed")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return Prune(evidence.n, select(draw(evidence, self.seed), keep, evidence))
