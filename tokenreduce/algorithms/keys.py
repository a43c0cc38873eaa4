"""Choosing among the cached keys of one layer, as methods of the cache stage do. Rows are KV heads, B*Hkv of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import BudgetError, Keep, check_keep
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.host import on_host, values
from tokenreduce.core.plan import Identity, Plan, Prune

__all__ = [
    "WHAT", "best_slots", "budget", "candidates", "check_finite", "check_rows", "check_what", "covered",
    "keep_best_slots", "keep_slots", "left_by_prompt", "pooled", "standing",
]  # fmt: skip

#: What a budget counts: visual keys (text stays), or all.
WHAT = ("visual", "all")


def check_what(what: str) -> None:
    """Raise ``ValueError`` unless ``what`` is "visual" or "all"."""
    if what not in WHAT:
        raise ValueError(f"what={what!r}: a budget counts 'visual' keys (all text stays) or 'all' keys")


def candidates(evidence: CacheEvidence, what: str) -> Tensor:
    """(B*Hkv,N) bool: the slots that a budget counts, and that may go."""
    return evidence.visual if what == "visual" else evidence.there


def budget(keep: Keep | Tensor, among: Tensor) -> Tensor:
    """(B*Hkv,1): how many of the slots ``among`` (B*Hkv,N) stay; the rule of :func:`tokenreduce.core.budget.count`,
    for rows with different numbers."""
    present = among.sum(1, keepdim=True)
    if isinstance(keep, Tensor):
        return torch.minimum(keep, present)
    check_keep(keep)
    if isinstance(keep, int):
        return present.clamp(max=keep)
    return torch.minimum((keep * present.double() + 0.5).long().clamp(min=1), present)


def standing(keep: Keep, evidence: CacheEvidence) -> Keep | Tensor:
    """``keep`` of all keys, for the step at hand: a ratio is of the prompt, and in decode stays what it was there.

    Raises ``ValueError`` in decode for a ratio and evidence without ``prompt_slots``.
    """
    if not evidence.step or isinstance(keep, int):
        return keep
    return evidence.counts if keep == 1 else left_by_prompt(evidence)


def left_by_prompt(evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,1): slots that the plan at the prompt left. Raises ``ValueError`` for evidence that does not say."""
    if evidence.prompt_slots is None:
        raise ValueError(
            "the budget is a share of the prompt, which evidence of a decode step does not show: give "
            "CacheEvidence(prompt_slots=...) or keep as a count"
        )
    return evidence.fold(evidence.prompt_slots)


def covered(keep: Keep | Tensor, evidence: CacheEvidence, what: str) -> bool:
    """Whether a budget keeps all that it counts, so that nothing need be scored."""

    def all_stay() -> bool:
        among = candidates(evidence, what)
        return bool((_budget(keep, evidence, what) >= among.sum(1, keepdim=True)).all())

    return all_stay() if isinstance(keep, Tensor) else evidence.marked(("covered", *_told_apart(keep), what), all_stay)


def _budget(keep: Keep | Tensor, evidence: CacheEvidence, what: str) -> Tensor:
    """:func:`budget` of the :func:`candidates`."""
    if isinstance(keep, Tensor):
        return budget(keep, candidates(evidence, what))
    key = ("budget", *_told_apart(keep), what)
    return evidence.marked(key, lambda: budget(keep, candidates(evidence, what)))


def _told_apart(keep: Keep) -> tuple[type, Keep]:
    """One key and all keys, 1 and 1.0, are the same to a dict."""
    return type(keep), keep


def check_rows(evidence: CacheEvidence, rows: int) -> None:
    """Raise ``ValueError`` where padding behind the prompt takes the place of some of the last ``rows`` real queries.

    Padding in front of a later turn does not: a row then has fewer queries to judge by.
    """
    rows = min(rows, evidence.rows_given)
    real = evidence.row_there(rows).sum(1, keepdim=True)
    if bool(((real < evidence.counts.clamp(max=rows)) & ~evidence.there[:, -1:]).any()):
        raise ValueError(
            f"padding behind the prompt stands where its last {rows} tokens are looked for; pad on the left"
        )


def keep_slots(stay: Tensor, evidence: CacheEvidence) -> Plan:
    """The plan that keeps the slots in ``stay`` (B*Hkv,N) bool, ascending; padding goes. The identity where every slot
    that is there stays, so that nothing is touched."""
    there = evidence.there
    stay = stay & there
    if on_host(stay):
        all_stay = np.array_equal(values(stay), values(there))
    else:
        all_stay = bool((stay == there).all())
    return Identity.like(evidence.keys) if all_stay else Prune.from_mask(stay)


def keep_best_slots(
    scores: Tensor,
    keep: Keep | Tensor,
    evidence: CacheEvidence,
    *,
    what: str = "visual",
    always: Tensor | None = None,
) -> Plan:
    """Keep the best slots by ``scores`` (B*Hkv,N) of those that ``what`` counts, and all others.

    ``always`` (B*Hkv,N) bool stay whatever their score, and count inside the budget where they are of the counted kind.
    Ties go to the lower slot. Raises ``ValueError`` for scores that are not finite on such slots, and for a budget
    that is smaller than what always stays.
    """
    if covered(keep, evidence, what):
        return Identity.like(evidence.keys)
    return keep_slots(best_slots(scores, keep, evidence, what=what, always=always), evidence)


def best_slots(
    scores: Tensor, keep: Keep | Tensor, evidence: CacheEvidence, *, what: str, always: Tensor | None = None
) -> Tensor:
    """(B*Hkv,N) bool: the slots that :func:`keep_best_slots` keeps; raises as it does."""
    among = candidates(evidence, what)
    wanted = _budget(keep, evidence, what)
    stay, free = evidence.marked(("others", what), lambda: evidence.there & ~among), among
    if always is not None:
        fixed = among & always
        held = fixed.sum(1, keepdim=True)
        if bool((held > wanted).any()):
            raise BudgetError(
                f"the budget of {int(wanted.min())} keys is below the {int(held.max())} that always stay (window and "
                f"sinks); give a larger keep, or smaller ones"
            )
        free, wanted, stay = among & ~always, wanted - held, stay | fixed
    check_finite(scores, free)
    return stay | best(scores, free, wanted)


def check_finite(scores: Tensor, among: Tensor) -> None:
    """Raise ``ValueError`` for NaN among the scores that decide."""
    if scores.dtype == torch.float32 and on_host(scores, among):
        bad = bool((np.isnan(values(scores)) & values(among)).any())
    else:
        bad = bool((scores.isnan() & among).any())
    if bad:
        raise ValueError("keys, values or attention of the cache hold NaN; the model's activations overflowed")


def pooled(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """``scores`` (...,N) smoothed by a window of ``kernel`` slots, stride 1: "avgpool" (zeros beyond the ends count)
    or "maxpool". Raises ``ValueError`` for an even kernel, which would change the length, and another kind."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel_size is an odd int >= 1, not {kernel!r}")
    if kind not in ("avgpool", "maxpool"):
        raise ValueError(f"pooling={kind!r}: choose 'avgpool' or 'maxpool'")
    if kernel == 1:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    pool = F.avg_pool1d if kind == "avgpool" else F.max_pool1d
    return pool(flat, kernel, 1, kernel // 2).view_as(scores)
