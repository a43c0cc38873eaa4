"""ZOO-Prune (arXiv 2509.24837): tokens that the projector answers to strongly, and that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, kept
from tokenreduce.algorithms.scoring import clean, finite, gram, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["ZOOPrune"]


@dataclass(frozen=True)
class ZOOPrune(Projector, name="zoo-prune", needs=("through",), paper="2509.24837", title="ZOO-Prune"):
    """ZOO-Prune: sensitivity of the projector, by zeroth-order differences, times diversity.

    The sensitivity S of a token is the mean over ``m`` directions u of |M(x + h u) - M(x - h u)| / 2h, where x is what
    enters the projector M for it and u has unit length; the directions are the same for all tokens. S is scaled to
    [0, 1] over the image (1 for all where it is constant). The first token is the one with the largest S; every further
    one has the largest S (1 - cos to the most similar of those chosen), on the embeddings behind the projector. Raster
    order.

    The official code is not public; this follows the paper's text. Where a token is made of several patches (Qwen's
    merger) one direction spans all of them, which is ours; InternVL's shuffled cells are rows as they are. Families
    whose connector mixes tokens, or pools them behind it, are refused. Directions are Gaussian and depend on ``seed``
    alone; the projector runs in float32, because steps of ``h`` vanish in half precision, and without its hooks. Ties
    go to the lower index.

    ``2 m`` passes through the projector are the method's cost, 128 by default: more than a small language model saves.
    ``exact`` takes directional derivatives instead, ``m`` passes of twice the size, and no step.

    Args:
        keep: 192, 128 or 64 of 576 in the paper.
        m: directions; 64, stable from 16.
        h: step, > 0; stable from 1e-4 to 1.
        exact: derivatives by forward-mode differentiation instead of differences (ours).
        seed: another seed, other directions.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 128
    m: int = 64
    h: float = 0.01
    exact: bool = False
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.m, "m", 1)
        check_count(self.seed, "seed")
        if not 0 < self.h < float("inf"):
            raise ValueError(f"h is a finite number > 0, not {self.h!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(self.order(evidence, keep), evidence)

    def order(self, evidence: VisualEvidence, keep: int | None = None) -> Tensor:
        """(B,K) the tokens that stay, counted behind the prefix, in the order in which they are chosen: a prefix is the
        answer for a smaller ``keep``."""
        strength = finite(self.sensitivity(evidence), evidence)
        z = clean(unit(evidence.projected.detach()), evidence)
        wanted = self.total(z.shape[1]) if keep is None else keep
        low = strength.amin(1, keepdim=True)
        span = strength.amax(1, keepdim=True) - low
        strength = torch.where(span > 0, (strength - low) / torch.where(span > 0, span, 1.0), 1.0)
        far, near = 1 - gram(z), torch.full_like(strength, float("inf"))
        score, chosen = strength, []
        for _ in range(wanted):
            chosen.append(score.argmax(1, keepdim=True))
            last = chosen[-1].unsqueeze(-1).expand(-1, 1, far.shape[2])
            near = torch.minimum(near, far.gather(1, last)[:, 0].clamp(min=0)).scatter(1, chosen[-1], float("-inf"))
            score = torch.where(near < 0, near, strength * near)
        return torch.cat(chosen, 1)

    def sensitivity(self, evidence: VisualEvidence) -> Tensor:
        """(B,N) float32 of the tokens behind the prefix."""
        rows, project = evidence.through
        rows = rows.detach().float()
        drawn = torch.randn(self.m, rows.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        total = torch.zeros_like(rows[..., 0])
        for u in unit(drawn).to(rows.device):
            if self.exact:
                change = torch.func.jvp(project, (rows,), (u.expand_as(rows),))[1]
            else:
                change = (project(rows + self.h * u) - project(rows - self.h * u)) / (2 * self.h)
            total += change.norm(dim=-1)
        return total / self.m
