"""KeyDiff (arXiv 2504.15364): keys that are unlike the average key stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.decode_scorer import DecodeScorer
from tokenreduce.algorithms.keys import budget, candidates, check_finite, covered, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["KeyDiff"]


@dataclass(frozen=True)
class KeyDiff(DecodeScorer, name="keydiff", paper="2504.15364", title="KeyDiff"):
    """KeyDiff: behind each layer's prefill, keep the keys with the smallest cosine to the mean of all unit keys, in
    every KV head by itself.

    Needs no attention, so that it fits every kernel. Keys are those behind their rotation, so that distance in the
    sequence counts as difference. All keys that are there make the mean, text among them; where most are visual, visual
    ones are alike and, with ``what="all"``, text stays.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        interval: with ``what="all"``, decode steps from one cut to the next; None, as published, cuts the prompt only.
        block: tokens that are taken in at once, as published: behind each block of the prompt the keys so far are cut
            to the budget, and the mean is of those that are left and the next block. None takes the prompt at once, as
            kvpress does without its block press. Peak memory is that of the whole prompt either way.

    Raises ``ValueError`` for values other than these.
    """

    interval: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            check_count(self.block, "block", 1)

    def importance(self, evidence: CacheEvidence) -> Tensor:
        return _unlike(evidence.keys, evidence.there)

    def plan(self, evidence: CacheEvidence) -> Plan:
        if self.block is None or evidence.step:
            return super().plan(evidence)
        if covered(self.keep, evidence, self.what):
            return Identity.like(evidence.keys)
        there, among = evidence.there, candidates(evidence, self.what)
        wanted = budget(self.keep, among)
        block = (there.long().cumsum(1) - 1) // self.block
        stay = torch.zeros_like(there)
        for i in range(int(block.max()) + 1):
            stay = stay | (there & (block == i))
            scores = _unlike(evidence.keys, stay)
            check_finite(scores, stay)
            stay = (stay & ~among) | best(scores, stay & among, wanted)
        return keep_slots(stay, evidence)


def _unlike(keys: Tensor, among: Tensor) -> Tensor:
    """(B*Hkv,N) minus the cosine of every key to the mean of the unit keys ``among`` (B*Hkv,N)."""
    unit = F.normalize(keys.float(), dim=-1).masked_fill(~among.unsqueeze(-1), 0.0)
    mean = unit.sum(1, keepdim=True) / among.sum(1).clamp(min=1).view(-1, 1, 1)
    return -F.cosine_similarity(unit, mean, dim=-1)
