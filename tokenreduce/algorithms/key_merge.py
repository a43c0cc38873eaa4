"""Merging keys and values that leave a cache into those that stay, as LOOK-M and MEDA do."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.algorithms.scoring import unit
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Merge, Mix, Plan, Prune

__all__ = ["MERGES", "TEXTS", "check_merge", "merge_slots", "text_first"]

#: What becomes of a pair that leaves.
MERGES = ("pivot", "average", "weighted", "none")
#: Whether all text stays beside the budget, or takes of it first.
TEXTS = ("keep", "budget")
#: Leaving keys that are compared with all that stay at once.
_CHUNK = 1024


def check_merge(merge: str, text: str) -> None:
    """Raise ``ValueError`` for an unknown way to merge, or an unknown rule for text."""
    if merge not in MERGES:
        raise ValueError(f"merge={merge!r}: choose one of {', '.join(MERGES)}")
    if text not in TEXTS:
        raise ValueError(f"text={text!r}: 'keep' keeps all text, 'budget' counts it inside the budget, text first")


def text_first(scores: Tensor, evidence: CacheEvidence, important: Tensor, recent: Tensor, text: str) -> Tensor:
    """(B*Hkv,N) bool: the last ``recent`` (B*Hkv,1) slots stay, and of those in front of them ``important`` (B*Hkv,1),
    text before vision and then by ``scores`` (B*Hkv,N). With ``text="keep"`` all text stays, also beyond that."""
    window = evidence.last(recent)
    words = evidence.there & ~window & ~evidence.visual
    number = words.sum(1, keepdim=True)
    chosen = words if text == "keep" else best(scores, words, important)
    return window | chosen | best(scores, evidence.visual & ~window, (important - number).clamp(min=0))


def merge_slots(stay: Tensor, evidence: CacheEvidence, merge: str, *, alike: bool = False) -> Plan:
    """The plan that keeps the slots in ``stay`` (B*Hkv,N) bool, and in which every other joins the kept one of its head
    whose key has the highest cosine with its own, ties to the lower slot.

    A kept c with members e_1 to e_m becomes ``merge="pivot"`` ((1 + m/2) c + sum e / 2) / (1 + m), "average"
    (c + sum e) / (1 + m), "weighted" (c + sum cos e) / (1 + m), which is no mean; "none" drops the others. With
    ``alike``, a slot whose highest cosine, averaged over the heads of its sample by its rank among those that go, is
    below that of all slots and heads, is dropped.
    """
    plan = keep_slots(stay, evidence)
    if merge == "none" or not isinstance(plan, Prune):
        return plan
    stay, gone = stay & evidence.there, evidence.there & ~stay
    place = stay.long().cumsum(1) - 1 + plan.k - stay.sum(1, keepdim=True)
    keys = unit(evidence.keys)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for key, kept, leaving in zip(keys, stay, gone, strict=True):
        to, src = kept.nonzero().flatten(), leaving.nonzero().flatten()
        src = src if len(to) else src[:0]
        near = [(key[part] @ key[to].T).max(1) for part in src.split(_CHUNK)] if len(src) else []
        cos = torch.cat([n.values for n in near]) if near else key.new_zeros(0)
        rows.append((src, to[torch.cat([n.indices for n in near])] if near else src, cos))
    if alike:
        heads = evidence.kv_heads
        rows = [row for b in range(evidence.batch) for row in _alike(rows[b * heads : (b + 1) * heads])]
    if merge == "weighted":
        return _weighted(plan, stay, rows)
    return _mean(plan, place, rows, 0.5 if merge == "pivot" else 1.0)


def _alike(heads: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The members of one sample's heads that are not below the mean."""
    most = max(len(cos) for _, _, cos in heads)
    table = torch.stack([torch.cat([cos, cos.new_full((most - len(cos),), float("nan"))]) for _, _, cos in heads])
    good = table.nanmean(0) >= table.nanmean()
    return [(src[ok], into[ok], cos[ok]) for src, into, cos in heads for ok in [good[: len(src)]]]


def _mean(plan: Prune, place: Tensor, rows: list[tuple[Tensor, Tensor, Tensor]], share: float) -> Plan:
    """Members of weight ``share``, what they lack of 1 on the side of the kept one."""
    most = max(len(src) for src, _, _ in rows)
    every, device = place.shape[0], place.device
    src, dst = torch.zeros(2, every, most, dtype=torch.long, device=device)
    scale = torch.ones(every, most, device=device)
    weights = torch.ones(every, plan.n, device=device)
    for i, (own, into, _) in enumerate(rows):
        weights[i, own] = share
        weights[i] += torch.bincount(into, minlength=plan.n) * (1 - share)
        fill = most - len(own)
        # Rows with fewer members: a kept slot joins itself, its own weight in equal parts, which changes nothing.
        kept = into[0] if len(into) else plan.keep[i, -1]
        weights[i, kept] /= 1 + fill
        src[i], dst[i] = torch.cat([own, kept.expand(fill)]), place[i, torch.cat([into, kept.expand(fill)])]
        scale[i, len(own) :] = 0.0
    ragged = not bool(scale.all())
    return Merge(plan.n, plan.keep, src, dst, weights, scale if ragged else None, plan.valid)


def _weighted(plan: Prune, stay: Tensor, rows: list[tuple[Tensor, Tensor, Tensor]]) -> Plan:
    """Members count their cosine, and all is divided by their number."""
    samples, rank = [], stay.long().cumsum(1) - 1
    for i, (own, into, cos) in enumerate(rows):
        kept = stay[i].nonzero().flatten()
        part = 1.0 / (1 + torch.bincount(into, minlength=plan.n)).float()
        to = rank[i, torch.cat([kept, into])]
        samples.append((kept, torch.cat([kept, own]), to, torch.cat([part[kept], cos * part[into]])))
    return Mix.from_samples(plan.n, samples)
