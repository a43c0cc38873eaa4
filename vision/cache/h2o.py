"""H2O (arXiv 2306.14048): keys that got most attention so far, the heavy hitters, and the last ones stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.decode_scorer import HeavyHitters
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(HeavyHitters, name="h2o", needs=("attention",), paper="2306.14048", title="H2O"):
    """H2O, the heavy-hitter oracle: every KV head keeps the keys with the most attention, summed over all queries.

    A key's score is its softmaxed attention, summed over the queries of the prompt and, in decode, over those that
    came since, averaged over the query heads of its KV head. With ``what="all"``, the last tokens stay (half of the
    budget as published) and in front of them the keys with the largest scores; in decode the row of the new token is
    added and the same cut made behind the step, so that the cache stays as large as it was behind the prompt and what
    left never returns. With ``what="visual"`` all text stays, the whole budget goes to the visual keys with the largest
    scores, inside the last tokens, too, and nothing goes while decoding.

    Sums are not divided by how many queries see a key, which favours the first tokens: sinks, and images that stand in
    front.

    Args:
        keep: keys of every KV head that stay of those that ``what`` counts; 20 % as in the paper.
        what: "visual" or "all", see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        interval: decode steps from one cut to the next; None cuts behind the prompt only.
        recent_share: with ``what="all"``, share of the budget that is the last tokens, rounded down.
        recent_size: instead, with ``what="all"``: last tokens that stay, inside the budget; 512 in the authors' class.
        hh_size: instead of ``keep``, together with ``recent_size``: keys that stay in front of them; 4 in the class.
        heavy_ratio, recent_ratio: instead of all these, with ``what="all"``: both in shares of the prompt, each rounded
            down; 0.1 and 0.1 in the authors' scripts. In decode the budget is what it was behind the prompt, and the
            window the nearest number to its part of it.
        normalise: ObservedAttention of kvpress instead: sums divided by the number of queries that see the key, no
            recent window, no cut while decoding. It keeps other keys than H2O does, sinks not among them.

    The cut is that of the authors' code which drops keys; their simulation, which masks them, hides the token that
    leaves the window for a step. It sums over the batch and knows no grouped queries; samples and KV heads are
    separate here.

    Raises ``ValueError`` for values other than these, sizes or ratios with ``what="visual"``, one of a pair
    alone, both pairs, any beside ``normalise``, and in a forward for a budget below ``recent_size``.
    """

    keep: int | float = 0.2
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise and (self.recent_size, self.heavy_ratio) != (None, None):
            raise ValueError("normalise=true has no recent window; give keep instead of sizes and ratios")

    def every(self) -> int:
        return 0 if self.normalise else super().every()

    def gained(self, evidence: CacheEvidence) -> Tensor:
        sums = evidence.column_sums().mean(1)
        return sums / evidence.readers().clamp(min=1) if self.normalise else sums

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return None if self.normalise else super().always(evidence)
