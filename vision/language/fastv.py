"""FastV (arXiv 2403.06764): drop the visual tokens that the prompt's last token attends to least."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.algorithms.sequence import keep_best
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(Reducer, name="fastv", stage="language", needs=("attention",), paper="2403.06764", title="FastV"):
    """FastV: before one layer, keep the visual tokens that the last prompt token attended to most in the layer before.

    The published *drop* variant: the score is the softmaxed attention of layer ``layer - 1``, averaged over heads,
    not renormalised over the visual tokens; kept tokens keep their order and their original positions; decoding makes
    no new choice. Every sample decides for itself (the official code lets the first one decide for the batch), and the
    last row is the last real token under right padding.

    Args:
        layer: 0-based first layer that sees fewer tokens (the authors' K; the paper counts from 1).
        keep: visual tokens that stay, a count or a ratio, rounded half up (the code's ``1 - R``, half to even).

    Raises ``ValueError`` for ``layer`` below 1 (no attention exists before layer 0) or a layer that the model does
    not have, and for a bad ``keep``.
    """

    layer: int = 2
    keep: int | float = 0.5

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", 1)
        check_keep(self.keep)

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        return keep_best(evidence.attention(evidence.last())[:, :, 0].mean(1), self.keep, evidence)
