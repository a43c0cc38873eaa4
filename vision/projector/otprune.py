"""OTPrune (arXiv 2602.20205): the visual tokens whose distribution is closest to that of all, by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, kept
from tokenreduce.algorithms.scoring import clean, gram
from tokenreduce.core.budget import count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["OTPrune"]

#: Gains that differ by less than this share of the largest are equal: the float64 rounding of equal tokens.
_TIE = 1e-12


@dataclass(frozen=True)
class OTPrune(Projector, name="otprune", paper="2602.20205", title="OTPrune"):
    """OTPrune: a greedy choice that brings the Gaussian of the chosen tokens close to the Gaussian of all.

    The 2-Wasserstein distance between both is replaced by log det(I + gamma S S^T), S = X X^T, where every channel of X
    is divided by its norm over the tokens of the image; tokens themselves keep their lengths. Every step takes the
    token that raises the determinant of the chosen part most (fast Cholesky updates); raster order.

    Different from the official code: it hands the chosen tokens on in the order of a hash table, here they are in
    order; row ends are no candidates by default; half precision features are read in float32, and what is computed of
    S is float64, because gains are close to each other once the choice spans all channels. A channel that is zero
    everywhere stays zero. Ties go to the lower index.

    Args:
        keep: tokens of an image that stay; 0.098 is the paper's 56 of 576. A ratio is rounded half to even, as there.
        gamma: weight of the kernel beside the identity, > 0.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.098
    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma < float("inf"):
            raise ValueError(f"gamma is a finite number > 0, not {self.gamma!r}")

    def total(self, present: int) -> int:
        return count(self.keep, present, "even")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(self.order(evidence, keep), evidence)

    def order(self, evidence: VisualEvidence, keep: int | None = None) -> Tensor:
        """(B,K) the tokens that stay, counted behind the prefix, in the order in which they are chosen: a prefix is the
        answer for a smaller ``keep``."""
        x = clean(evidence.x[:, evidence.prefix :].detach().float(), evidence)
        wanted = self.total(x.shape[1]) if keep is None else keep
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alike = gram(x).double()
        kernel = torch.baddbmm(
            torch.eye(x.shape[1], dtype=alike.dtype, device=x.device), alike, alike, alpha=self.gamma
        )
        return _determinant(kernel, wanted)


def _determinant(kernel: Tensor, keep: int) -> Tensor:
    """(B,K) greedy choice of the largest determinant from ``kernel`` (B,N,N) float64, all of whose gains are >= 1."""
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(len(kernel), keep, kernel.shape[1])
    chosen = []
    for t in range(keep):
        best = (gain >= gain.amax(1, keepdim=True) * (1 - _TIE)).int().argmax(1, keepdim=True)
        at = best.unsqueeze(1)
        row = kernel.gather(1, best.unsqueeze(-1).expand(-1, 1, kernel.shape[2]))
        if t:
            past = rows[:, :t].gather(2, at.expand(-1, t, 1))
            row = row - past.transpose(1, 2) @ rows[:, :t]
        rows[:, t] = row[:, 0] / gain.gather(1, best).sqrt()
        gain = (gain - rows[:, t].square()).scatter(1, best, float("-inf"))
        chosen.append(best)
    return torch.cat(chosen, 1)
