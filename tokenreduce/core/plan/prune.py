"""Plans that keep some tokens and drop the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.core.host import marked, on_host, values
from tokenreduce.core.plan.base import Plan
from tokenreduce.core.plan.rows import take, take_each

__all__ = ["Prune"]


@dataclass(frozen=True, eq=False, repr=False)
class Prune(Plan):
    """Keep the tokens ``keep`` (B,K), in that order; drop the rest."""

    keep: Tensor
    valid: Tensor | None = None

    @classmethod
    def from_mask(cls, stay: Tensor) -> Prune:
        """Keep the tokens marked in ``stay`` (B,N) bool, in order.

        Samples that keep fewer are filled on the left with slots that are not there, so that the last token stays
        last, as generation needs it.
        """
        counts = stay.sum(1).tolist()
        k = max(counts)
        if min(counts) == k and stay.dtype == torch.bool and on_host(stay):
            return cls(stay.shape[1], torch.from_numpy(marked(values(stay), k)))
        keep = stay.long().argsort(dim=1, stable=True)[:, stay.shape[1] - k :]
        return cls(stay.shape[1], keep, None if min(counts) == k else stay.gather(1, keep))

    def representatives(self) -> Tensor:
        return self.keep

    def sources(self) -> Tensor:
        out = torch.full((self.keep.shape[0], self.n + 1), -1, dtype=torch.long, device=self.keep.device)
        at = self.keep if self.valid is None else torch.where(self.valid, self.keep, self.n)
        return out.scatter(1, at, torch.arange(self.keep.shape[1], device=at.device).expand_as(at))[:, : self.n]

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return take(x, self.keep)

    def reduce_alike(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """:meth:`reduce` of several tensors of the same shape."""
        return take_each(tensors, self.keep)

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        if size is None and self.valid is None:
            return None
        out = torch.ones(self.keep.shape, device=self.keep.device) if size is None else size.gather(1, self.keep)
        return out if self.valid is None else out.masked_fill(~self.valid, 0.0)

    def _fused(self, other: Plan) -> Plan | None:
        if not isinstance(other, Prune):
            return None
        valid = other.valid
        if self.valid is not None:
            mine = self.valid.gather(1, other.keep)
            valid = mine if valid is None else mine & valid
        return Prune(self.n, self.keep.gather(1, other.keep), valid)
