"""Knorm (arXiv 2406.11430): keys of small norm get much attention, and stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["Knorm"]


@dataclass(frozen=True)
class Knorm(KeyScorer, name="knorm", paper="2406.11430", title="Knorm"):
    """Knorm: behind each layer's prefill, keep the keys with the smallest L2 norm, in every KV head by itself.

    Needs no attention, so that it fits every kernel. With norms on queries and keys (Qwen3, Gemma 3) all key norms are
    nearly equal, and the choice is almost noise.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        recent: last tokens that always stay; 0 as published.
        skip: first layers that are left alone; 0 as in kvpress, 2 in the paper.

    Raises ``ValueError`` for negative numbers.
    """

    recent: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.recent, "recent")
        check_count(self.skip, "skip")

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer >= self.skip

    def importance(self, evidence: CacheEvidence) -> Tensor:
        return -evidence.keys.float().norm(dim=-1)

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.last(self.recent) if self.recent else None
