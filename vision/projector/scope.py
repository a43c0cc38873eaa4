"""SCOPE (arXiv 2510.24214): greedy choice of salient tokens that cover the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.greedy import cover
from tokenreduce.algorithms.projector import Salient, kept
from tokenreduce.algorithms.scoring import descending, finite, gram, unit
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, take

__all__ = ["COMBINATIONS", "SCOPE"]

COMBINATIONS = ("product", "sum")
#: Float32 cosines of equal features differ by this much; a gain that small is none.
ROUNDING = 2.0**-21


@dataclass(frozen=True)
class SCOPE(Salient, name="scope", needs=("tower",), paper="2510.24214", title="SCOPE"):
    """SCOPE: saliency-coverage oriented pruning on features before the projector; raster order.

    A token is covered as far as its highest cosine to a chosen one (at least 0). Every step takes the token with the
    highest score gain * a^alpha, where the gain is the coverage that it adds over all tokens, and ``a`` the attention
    of the class token to it. Ties go to the more salient token, then to the lower index: once everything is covered
    the official code takes tokens by index. Also different from it: gains within float32 rounding of 0 count as 0, an
    all-zero feature covers nothing (NaN there), and no token comes twice. A tower without class token has no published
    rule; ``score="auto"`` then takes the mean attention received.

    Args:
        keep: 64 of 576 in the paper; a count is for the whole image.
        alpha: exponent of the saliency, >= 0.
        combination: "product", or "sum" for gain + a^alpha, where ``a`` is summed over heads as in the official code
            (which makes no difference to the product).
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 64
    alpha: float = 1.0
    combination: str = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        a = self.alpha
        if isinstance(a, bool) or not isinstance(a, int | float) or not 0 <= a < math.inf:
            raise ValueError(f"alpha is a number >= 0, not {a!r}")
        if self.combination not in COMBINATIONS:
            raise ValueError(f"combination is one of {COMBINATIONS}, not {self.combination!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(self.order(evidence, keep), evidence)

    def order(self, evidence: VisualEvidence, keep: int | None = None) -> Tensor:
        """(B,K) the tokens that stay, counted behind the prefix, in the order in which they are chosen: a prefix is the
        answer for a smaller ``keep``."""
        saliency = self.saliency(evidence)
        n = saliency.shape[1]
        wanted = self.total(n) if keep is None else keep
        # Listed by saliency, the first of several maxima is the most salient one.
        listed = descending(saliency)
        weight = saliency.gather(1, listed)
        if self.combination == "sum":
            seen = evidence.tower(self.layer)
            weight = weight * getattr(seen, "patches", seen).attention.heads
        weight = weight**self.alpha
        u = unit(take(evidence.features[:, evidence.prefix :].detach(), listed))
        similar = finite(gram(u), evidence).clamp_(min=0)
        chosen = cover(similar, wanted, weight, combination=self.combination, least=n * ROUNDING)
        return listed.gather(1, chosen)
