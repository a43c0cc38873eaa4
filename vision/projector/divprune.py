"""DivPrune (arXiv 2503.02175): keep the visual tokens that are most different from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenreduce.algorithms.greedy import farthest
from tokenreduce.algorithms.projector import Projector, kept
from tokenreduce.algorithms.scoring import clean, gram, unit
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(Projector, name="divprune", paper="2503.02175", title="DivPrune"):
    """DivPrune: greedy max-min diversity of the visual embeddings, by cosine distance.

    The first token is the one whose nearest neighbour is farthest; every further one is farthest from the chosen.
    Ties go to the lower index, kept tokens stay in order. Different from the official code: every image is chosen
    from on its own, the number that stays is rounded half up (half to even there), distances are float32, an all-zero
    token has distance 1 to all others, and a token is chosen once even when only duplicates are left.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`. ``keep`` is the paper's
            0.098 for images by default (SUBSET_RATIO; 0.1 for videos).

    Raises ``ValueError`` for other settings than those.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.098

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(self.order(evidence, keep), evidence)

    def order(self, evidence: VisualEvidence, keep: int | None = None) -> Tensor:
        """(B,K) the tokens that stay, in the order in which they are chosen: a prefix is the answer for a smaller
        ``keep``."""
        x = evidence.x[:, evidence.prefix :].detach()
        wanted = self.total(x.shape[1]) if keep is None else keep
        alike = gram(clean(unit(x), evidence))
        return farthest(alike.neg_().add_(1).clamp_(min=0), wanted)
