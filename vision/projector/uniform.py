"""Uniform pruning before the language model: every n-th token or a regular sub-grid, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.algorithms.baseline import full_grid, spread
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.scoring import select
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Prune

__all__ = ["UniformTokens"]


@dataclass(frozen=True)
class UniformTokens(Projector, name="uniform@projector", title="Uniform pruning before the language model"):
    """Uniform pruning: in every view, keep tokens at equal distances; raster order.

    Of N tokens, K stay: those at floor((i+1/2) N/K). Where the tokens fill a grid, K is rows times columns of a
    sub-grid, and its two strides differ by a factor of at most 2, the rows and columns of that sub-grid stay instead
    (the one with the most equal strides), so that both directions are thinned alike. Inside an encoder ``uniform``
    follows the same rule.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return Prune(evidence.n, select(spread(evidence, keep, full_grid(evidence)), keep, evidence))
