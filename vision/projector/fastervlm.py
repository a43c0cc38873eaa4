"""FasterVLM (arXiv 2412.01818v1): keep the visual tokens that the class token of the vision encoder attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.algorithms.projector import Salient, kept, top
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["FasterVLM"]


@dataclass(frozen=True)
class FasterVLM(Salient, name="fastervlm", needs=("tower",), paper="2412.01818", title="FasterVLM"):
    """FasterVLM: the tokens with the highest class-token attention, averaged over heads; raster order.

    Different from the official code: scores are float32 (half precision there makes ties), ties go to the lower index,
    row ends of LLaVA-NeXT stay by default (``newlines="drop"`` is the official layout), patches that only cover
    padding are never candidates, and crops are those of the stock model. A tower without class token has no published
    rule; ``score="auto"`` then ranks by the mean attention received, as the successor VisPruner is ported.

    Args:
        keep: 144, 58 or 29 of 576 in the paper; a count is for the whole image (the official one is per view).
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(top(self.saliency(evidence), keep), evidence)
