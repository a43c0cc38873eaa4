"""Which queries of a prompt judge its cached keys, and what the heads of one sample say together."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.core.evidence import CacheEvidence

__all__ = ["above_share", "carried", "marked_sums", "over_heads", "span"]


def span(marks: Tensor, evidence: CacheEvidence) -> int:
    """How many of the last queries that are known hold all the slots in ``marks`` (B*Hkv,N); 0 where none are
    marked."""
    at = marks.any(0).nonzero()
    return min(evidence.n - int(at[0]), evidence.rows_given) if len(at) else 0


def marked_sums(evidence: CacheEvidence, marks: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B*Hkv,G,N): what every slot got from the queries at the slots in ``marks`` (B*Hkv,N), each times its weight
    (B*Hkv,N); zero where none are marked. No rows before the first marked one are computed."""
    rows = span(marks, evidence)
    if not rows:
        return torch.zeros(evidence.keys.shape[0], evidence.groups, evidence.n, device=evidence.keys.device)
    given = marks.float() if weights is None else weights.float() * marks
    return evidence.column_sums(given[:, evidence.n - rows :], rows)


def over_heads(values: Tensor, evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,N): mean of ``values`` (B*Hkv,N) over the heads of a sample that hold the same column."""
    columns = evidence.unfold(evidence.columns.masked_fill(~evidence.there, -1))
    split = evidence.unfold(values)
    if bool((columns == columns[:, :1]).all()):
        return evidence.fold(split.mean(1))
    # Heads that an earlier plan left different slots: columns are what they share.
    at = columns.flatten(1) + 1
    width = int(at.max()) + 1
    flat = split.flatten(1).double()
    total = flat.new_zeros(len(flat), width).scatter_add(1, at, flat)
    number = flat.new_zeros(len(flat), width).scatter_add(1, at, torch.ones_like(flat))
    return (total / number.clamp(min=1)).gather(1, at).to(values.dtype).view_as(values)


def carried(evidence: CacheEvidence, first: Tensor) -> Tensor:
    """(B*Hkv,1): the number that the running score carries from step to step, or ``first`` (B*Hkv,1) where it carries
    none yet. The running score (or its last channel) holds it at every slot, new ones apart, which have 0."""
    scores = evidence.scores
    if scores is None:
        return first
    held = (scores if scores.dim() == 2 else scores[..., -1]).masked_fill(~evidence.there, 0).amax(1, keepdim=True)
    return torch.where(held > 0, held.to(first.dtype), first)


def above_share(evidence: CacheEvidence, name: str) -> Tensor:
    """(B*Hkv,1) bool, in decode: whether a layer has at least one slot more than its share of the tokens seen, which is
    what the prompt's plan left of the prompt. A step is one token. Raises ``ValueError`` that names the method where
    the evidence lacks that number."""
    left = evidence.prompt_slots
    if left is None:
        raise ValueError(f"in decode, {name} needs how many slots the prompt's plan left: give prompt_slots")
    prompt = (evidence.seen - evidence.step).clamp(min=1)
    gone = 1 - left.double() / prompt
    return (evidence.counts - evidence.seen * (1 - gone)).long() > 0
