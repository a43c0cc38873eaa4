"""TOVA (arXiv 2401.06104): the keys that the last token attends to least go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.decode_scorer import DecodeScorer
from tokenreduce.algorithms.keys import check_rows
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(DecodeScorer, name="tova", needs=("attention",), paper="2401.06104", title="TOVA"):
    """TOVA: the last token's softmaxed attention, averaged over all query heads of the layer, says which keys stay: one
    choice for all heads. Nothing adds up over steps.

    Behind the prompt all keys are judged at once by its last token, as in kvpress. With ``what="all"``, in decode the
    key with the least weight of the step at hand goes whenever the cache has outgrown the budget, which is the
    published rule. The last token of a chat template is a poor judge of an image.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`. With ``what="visual"`` nothing goes
            while decoding.
        interval: with ``what="all"``, decode steps from one cut to the next; None cuts behind the prompt only.
        recent: last tokens that always stay; 1 as in kvpress, 0 is the authors' code.

    Raises ``ValueError`` for values other than these, and in a forward for a budget below ``recent``, prompts that are
    padded behind, and heads that do not hold the same slots.
    """

    recent: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.recent, "recent")

    def query_rows(self) -> int:
        return 1

    def importance(self, evidence: CacheEvidence) -> Tensor:
        check_rows(evidence, 1)
        there = evidence.unfold(evidence.there)
        if bool((there != there[:, :1]).any()):
            raise ValueError(
                "tova makes one choice for all heads of a layer, which hold different slots here; let no other method "
                "evict from the cache before it"
            )
        row = evidence.rows(1)[:, :, 0].mean(1)
        return evidence.fold(evidence.unfold(row).mean(1)).masked_fill(~evidence.there, 0.0)

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.last(self.recent) if self.recent else None
