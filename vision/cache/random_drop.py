"""Random eviction from the cache: the baseline that every method there has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.baseline import draws
from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.algorithms.keys import candidates
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["RandomKeys"]


@dataclass(frozen=True)
class RandomKeys(KeyScorer, name="random@cache", title="Random eviction from the cache"):
    """Random eviction: behind each layer's prefill, keys stay by a draw, in every KV head by itself.

    The draw is a hash of ``seed``, the layer, a key's place among those that are counted and their coarse content, so
    that text, padding, other samples and the device change nothing: see
    :func:`tokenreduce.algorithms.baseline.draw`. Nothing is evicted while decoding.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        seed: another seed, another draw.

    Raises ``ValueError`` for a negative ``seed``, and a bad ``keep`` or ``what``.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.seed, "seed")

    def importance(self, evidence: CacheEvidence) -> Tensor:
        return draws(evidence.keys, self.seed, evidence, None, candidates(evidence, self.what))
