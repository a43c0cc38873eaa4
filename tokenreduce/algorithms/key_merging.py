"""Plans in which cached slots that go join slots that stay, per KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Merge, Plan, Prune

__all__ = ["merge_slots"]


def merge_slots(stay: Tensor, into: Tensor, evidence: CacheEvidence, weights: Tensor | None = None) -> Plan:
    """The plan that keeps the slots in ``stay`` (B*Hkv,N) bool, ascending; slot n of the others joins the kept slot
    ``into[n]`` (B*Hkv,N), or goes where that is -1.

    ``weights`` (B*Hkv,N), above 0 where slots stay or join, are what members weigh in the mean; 1 by default. Rows may
    keep and merge different numbers of slots.
    """
    stay = stay & evidence.there
    joins = (into >= 0) & evidence.there & ~stay
    if not bool(joins.any()):
        return keep_slots(stay, evidence)
    kept = Prune.from_mask(stay)
    keep, n = kept.keep, evidence.n
    place = keep.shape[1] - stay.sum(1, keepdim=True) + stay.long().cumsum(1) - 1
    # First those that join, then those that go, those that stay, padding: rows with fewer are filled up from behind.
    goes = evidence.there & ~stay & ~joins
    rank = torch.where(joins, 0, torch.where(goes, 1, torch.where(stay, 2, 3)))
    order = rank.argsort(dim=1, stable=True)
    number = joins.sum(1, keepdim=True)
    width = int(number.max())
    at = torch.arange(width, device=keep.device)
    # A slot that goes brings nothing. In a row where none does, the last that joins is brought in parts; in one where
    # every slot stays, one joins itself.
    last = (number - 1 + goes.any(1, keepdim=True).long()).clamp(min=0)
    index = torch.minimum(at.expand(keep.shape[0], -1), last)
    src = order.gather(1, index)
    target = torch.where(joins, place.gather(1, into.clamp(min=0)), keep.shape[1] - 1)
    target = torch.where(stay, place, target)
    real, parts = joins.gather(1, src), (index == last).sum(1, keepdim=True).clamp(min=1)
    share = torch.where(real & (index == last), 1.0 / parts, 1.0)
    weight = torch.ones(stay.shape, device=keep.device) if weights is None else weights.float()
    weight = torch.where(stay | joins, weight, 0.0) * torch.ones_like(weight).scatter(1, src, share)
    whole = bool((real & (share == 1)).all())
    return Merge(n, keep, src, target.gather(1, src), weight, None if whole else share * real, kept.valid)
