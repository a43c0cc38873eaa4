"""DivPrune (arXiv 2503.02175): keep the visual tokens that are most different from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.budget import count
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Identity, Plan, Prune
from tokenreduce.projector import Projector
from tokenreduce.scoring import finite, inner, unit

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(Projector, name="divprune", paper="2503.02175", title="DivPrune"):
    """DivPrune: greedy max-min diversity of the visual embeddings, by cosine distance.

    The first token is the one whose nearest neighbour is farthest; every further one is farthest from the chosen.
    Ties go to the lower index, kept tokens stay in order. Different from the official code: every image is chosen
    from on its own, the number that stays is rounded half up (half to even there), distances are float32, an all-zero
    token has distance 1 to all others, and a token is chosen once even when only duplicates are left.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.projector.Projector`. ``keep`` is the paper's 0.098 for
            images by default (SUBSET_RATIO; 0.1 for videos).
    """

    keep: int | float = 0.098

    def plan(self, evidence: Evidence) -> Plan:
        free = self._free(evidence)
        if free is None:
            if count(self.keep, evidence.n) == evidence.n:
                return Identity.like(evidence.x)
            return Prune(evidence.n, self.order(evidence).sort(dim=1).values)
        order = self.order(evidence)
        stay = torch.zeros(evidence.batch, evidence.n + 1, dtype=torch.bool, device=order.device)
        stay = stay.scatter(1, torch.where(order < 0, evidence.n, order), True)[:, :-1]
        return Identity.like(evidence.x) if bool((stay == free).all()) else Prune.from_mask(self._fixed(evidence, stay))

    def order(self, evidence: Evidence) -> Tensor:
        """(B,K) the tokens that stay, in the order in which they are chosen: a prefix is the answer for a smaller
        ``keep``. Samples that have fewer than others are filled with -1 at the end."""
        x, free = evidence.x.detach(), self._free(evidence)
        m = unit(x)
        distance = (1 - inner(m, m)).clamp(min=0)
        present = [evidence.n] * evidence.batch if free is None else free.sum(1).tolist()
        wanted = [count(self.keep, p) for p in present]
        own = torch.eye(evidence.n, dtype=torch.bool, device=x.device)
        others = distance.masked_fill(own, float("inf"))
        if free is not None:
            others = others.masked_fill(~free.unsqueeze(1), float("inf"))
        nearest = finite(others.amin(2), evidence)
        if free is not None:
            nearest = nearest.masked_fill(~free, float("-inf"))
        chosen = [nearest.argmax(1, keepdim=True)]
        far = torch.full_like(nearest, float("inf"))
        if free is not None:
            far = far.masked_fill(~free, float("-inf"))
        for _ in range(max(wanted) - 1):
            last = chosen[-1]
            row = distance.gather(1, last.unsqueeze(-1).expand(-1, -1, evidence.n)).squeeze(1)
            far = torch.minimum(far, row).scatter(1, last, float("-inf"))
            chosen.append(far.argmax(1, keepdim=True))
        out = torch.cat(chosen, 1)
        if free is None:
            return out
        rank = torch.arange(out.shape[1], device=out.device)
        return torch.where(rank < torch.tensor(wanted, device=out.device).unsqueeze(1), out, -1)

    @staticmethod
    def _fixed(evidence: Evidence, stay: Tensor) -> Tensor:
        """``stay`` (B,N) and the tokens that must stay."""
        fixed = evidence.fixed()
        stay = stay if fixed is None else stay | fixed
        return stay if evidence.valid is None else stay & evidence.valid

    @staticmethod
    def _free(evidence: Evidence) -> Tensor | None:
        """(B,N) bool of the tokens to choose from, None when all are."""
        fixed = evidence.fixed()
        if evidence.valid is None:
            return None if fixed is None else ~fixed
        return evidence.valid if fixed is None else evidence.valid & ~fixed
