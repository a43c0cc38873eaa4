"""Cuts: the columns that a plan left from a layer on, and how many tokens each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.adapters.language.indices import ColumnIndex, SlotIndex
from tokenreduce.core.plan import Plan, take

__all__ = ["Cut", "columns_order", "count_sizes", "slots_kept"]


def slots_kept(plan: Plan) -> SlotIndex:
    """What a plan over a sequence leaves of it: (B,K) ascending, empty slots on the left."""
    kept, order = SlotIndex(plan.representatives(), plan.validity()), columns_order(plan)
    return kept.take(order)


def columns_order(plan: Plan) -> Tensor:
    """(B,K): which output of a plan comes at each place of :func:`slots_kept`."""
    index, valid = plan.representatives(), plan.validity()
    return (index if valid is None else torch.where(valid, index, index - plan.n)).argsort(dim=1, stable=True)


@dataclass
class Cut:
    """From ``layer`` on, only the prompt's ``columns`` (B,K) are left."""

    layer: int
    columns: ColumnIndex
    #: (B,K) the same tokens in the sequence that an earlier cut left.
    local: SlotIndex
    #: (B,K) whether a slot may be attended to, padding included; None when all may.
    seen: Tensor | None = None
    #: What makes the features of the columns, where that is more than taking them.
    plan: Plan | None = None
    #: How many of the columns an earlier call put into the cache, in front of this prompt's.
    front: int = 0
    #: (B,K) how many tokens each slot stands for, and what that adds to the logits of its key; None where nothing.
    size: Tensor | None = None
    bias: Tensor | None = None

    @property
    def k(self) -> int:
        return self.columns.k

    @property
    def here(self) -> Tensor:
        """(B,K) :attr:`columns` among those that the prompt's own call brings."""
        return self.columns.at[:, self.front :] - self.front if self.front else self.columns.at

    def take(self, x: Tensor) -> Tensor:
        """Features (B,N,C) of the columns that an earlier cut left, to (B,K,C)."""
        where = self.local.at
        if self.plan is not None:
            x, where = self.plan.reduce(x), columns_order(self.plan)
        return take(x, where)

    def crop(self, k: int) -> None:
        """Forget all slots but the first ``k``."""
        self.columns, self.local = self.columns.part(slice(k)), self.local.part(slice(k))
        self.seen = None if self.seen is None else self.seen[:, :k]
        self.size = None if self.size is None else self.size[:, :k]
        self.bias = None if self.bias is None else self.bias[:, :k]


def count_sizes(made: Cut, before: Cut | None, plan: Plan, power: float) -> None:
    """Note in ``made`` how many tokens its slots stand for by ``plan`` and the cut ``before``, and what that adds to
    the logits of their keys: the logarithm, times ``power``."""
    sizes = None if before is None else before.size
    if sizes is None and not power:
        return
    here = None if sizes is None else sizes[:, made.front :]
    order = columns_order(plan)
    if power:
        size = plan.reduce_size(here)
        if size is None:
            return
        size = size.gather(1, order).clamp(min=1)
        bias = size.log() * power
    else:  # a method that counts none: what stands here keeps what it counted
        assert before is not None
        held = [t[:, made.front :] for t in (before.size, before.bias) if t is not None]
        size, bias = (plan.gather(t).gather(1, order) for t in held)
    if made.front:
        ahead = torch.ones(len(size), made.front, dtype=size.dtype, device=size.device)
        size, bias = torch.cat([ahead, size], 1), torch.cat([ahead * 0, bias], 1)
    made.size, made.bias = size, bias
