"""Choosing among the visual tokens of a mixed sequence, as methods inside a language model do."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.budget import Keep, check_keep
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Identity, Plan, Prune
from tokenreduce.scoring import descending, finite

__all__ = ["keep_best", "visual_counts"]


def visual_counts(keep: Keep, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """``(present, wanted)``, (B,1) each: visual tokens of every sample and how many of them stay.

    The same rule as :func:`tokenreduce.budget.count`, for samples with different numbers of visual tokens.
    """
    check_keep(keep)
    assert evidence.visual is not None
    present = evidence.visual.sum(1, keepdim=True)
    if isinstance(keep, int):
        wanted = present.clamp(max=keep)
    else:
        wanted = torch.minimum((keep * present.double() + 0.5).long().clamp(min=1), present)
    return present, wanted


def keep_best(scores: Tensor, keep: Keep, evidence: Evidence) -> Plan:
    """Keep the best visual tokens of every sample by ``scores`` (B,N) and all other tokens, in order.

    Ties go to the lower index. The identity when the budget covers every visual token.
    """
    visual = evidence.visual
    if visual is None:
        raise ValueError("the evidence marks no visual tokens: give Evidence(visual=...) with a bool mask (B,N)")
    present, wanted = visual_counts(keep, evidence)
    if bool((wanted == present).all()):
        return Identity.like(evidence.x)
    ranked = descending(finite(scores, evidence).float().masked_fill(~visual, float("-inf")))
    place = torch.arange(evidence.n, device=ranked.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, place)
    return Prune.from_mask(~visual | (rank < wanted))
