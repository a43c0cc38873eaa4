"""Plans with dense weights over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.core.plan.base import Plan

__all__ = ["Pool"]


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Plan):
    """Dense weights (B,K,N): output k is ``sum_n weights[k,n] x[n]``, divided by the row sum if ``normalised``.

    ``keep`` (B,K) are the tokens that outputs take their positions from; by default those that weigh most.
    """

    weights: Tensor
    normalised: bool = True
    by_size: bool = False
    valid: Tensor | None = None
    keep: Tensor | None = None

    def representatives(self) -> Tensor:
        return self.weights.argmax(-1) if self.keep is None else self.keep

    def untouched(self) -> Tensor:
        own = self.weights.gather(2, self.representatives().unsqueeze(-1)).squeeze(-1)
        alone = (self.weights != 0).sum(-1) == 1
        return alone & (own != 0) & (self.normalised | (own == 1))

    def sources(self) -> Tensor:
        best, output = self.weights.max(1)
        return torch.where(best > 0, output, -1)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        w = self.weights.to(x.dtype)
        if self.by_size and size is not None:
            w = w * size.unsqueeze(1).to(x.dtype)
        if self.normalised:
            w = w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        return (w @ x.flatten(2)).view(x.shape[0], w.shape[1], *x.shape[2:])

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        # A token that feeds several outputs is shared out, so that the mass of sizes is conserved.
        size = torch.ones(self.weights.shape[0], self.n, device=self.weights.device) if size is None else size
        share = self.weights / self.weights.sum(1, keepdim=True).clamp(min=torch.finfo(self.weights.dtype).tiny)
        return (share.to(size.dtype) @ size.unsqueeze(-1)).squeeze(-1)

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Every token receives the mean of the outputs it fed, weighted by how much; see :meth:`Plan.expand`."""
        w = self.weights.to(y.dtype).transpose(1, 2)
        total = w.sum(-1, keepdim=True)
        out = (w / total.clamp(min=torch.finfo(w.dtype).tiny)) @ y.flatten(2)
        missing = (total == 0).view(*total.shape[:2], *([1] * (y.dim() - 2)))
        filler = torch.as_tensor(fill, dtype=y.dtype, device=y.device)
        return torch.where(missing, filler, out.view(*out.shape[:2], *y.shape[2:]))
