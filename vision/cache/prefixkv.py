"""PrefixKV (arXiv 2412.03409): every layer keeps the keys that hold the same share of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import above_share, over_heads
from tokenreduce.algorithms.keys import candidates, check_finite, check_what, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.algorithms.shares import allot, check_ratio, total_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["PrefixKV"]

#: The search for a threshold ends within so many keys of the total, or after so many halvings.
_NEAR, _STEPS = 5, 60


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer: what its keys are worth, (B*Hkv,N), the same for all heads of a sample."""

    evidence: CacheEvidence
    scores: Tensor


@dataclass(frozen=True)
class PrefixKV(CacheReducer, name="prefixkv", needs=("attention",), paper="2412.03409", title="PrefixKV"):
    """PrefixKV: behind the last layer's prefill, find one share of attention that all layers keep within the budget.

    A key's score is the attention of all queries of the prompt, averaged over all query heads and summed. With a
    layer's keys in falling order, c(i) is the share of the first i. A threshold p, found by halving [0, 1], makes every
    layer keep the shortest prefix that reaches p; the keys that this removes are scaled to the budget. The keys with
    the lowest scores go, the same for all heads of a layer, but never the first ``start_size`` and the last.
    With ``what="all"``, decode drops one slot of a layer whenever it has at least one more than its share of the tokens
    seen: always the one at a fixed place, ``distance`` from the end of what the prompt left, so that a hole wanders
    there. With "visual", text and new tokens stay, and decode drops nothing. Peak memory does not fall.

    Args:
        keep: budget of all layers on average, a share or a count. The paper's r is this share; the code's ``ratio`` is
            the share that goes.
        what: "visual" keys, which then alone are ranked and counted, or "all" as published.
        ratio: instead of ``keep``, with ``what="all"``: the share that goes, as in the code.
        start_size: first slots that stay; 1 in the scripts, 4 in the code's class.
        distance: place of the slot that goes in decode; a positive one is the slot's number itself. Where the prompt
            left too few, it is the middle of them.
        exact: whether integers are allotted by largest remainder, which meets the total; else rounded down as in the
            code, which removes up to L - 1 keys fewer.

    Layer shares are found for every prompt; the paper's profile of ten prompts gives equal results.

    Raises ``ValueError`` for numbers out of range, and ``ratio`` beside ``keep`` or with ``what="visual"``.
    """

    keep: int | float = 0.25
    what: str = "visual"
    ratio: float | None = None
    start_size: int = 1
    distance: int = -25
    exact: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.start_size, "start_size")
        if self.distance == 0:
            raise ValueError("distance is below 0, from the end of what the prompt left, or above 0, a slot's number")
        check_ratio(self.ratio, self.what, self.keep == type(self).keep)

    def moment(self) -> str:
        return "prompt"

    def every(self) -> int:
        return 1 if self.what == "all" else 0

    # -- behind the prompt -------------------------------------------------------------------------------------------
    def summary(self, evidence: CacheEvidence) -> _Layer:
        scores = over_heads(evidence.column_sums().mean(1), evidence)
        check_finite(scores, evidence.there)
        return _Layer(evidence.bare(), scores)

    def decide(self, summaries: Sequence[_Layer]) -> list[Plan]:
        n = torch.stack([self._number(s, candidates(s.evidence, self.what)) for s in summaries], 1)
        fixed = n - torch.stack([self._number(s, self._free(s.evidence)) for s in summaries], 1)
        shares = [self._shares(s) for s in summaries]
        removed = torch.zeros_like(n)
        for b in range(len(n)):
            removed[b] = self._removed([share[b] for share in shares], n[b], fixed[b])
        plans = []
        for layer, gone in zip(summaries, removed.unbind(1), strict=True):
            evidence, free = layer.evidence, self._free(layer.evidence)
            stay = best(layer.scores, free, free.sum(1, keepdim=True) - evidence.fold(gone.unsqueeze(1)))
            plans.append(keep_slots(stay | ~free, evidence))
        return plans

    def _free(self, evidence: CacheEvidence) -> Tensor:
        return candidates(evidence, self.what) & ~evidence.first(self.start_size) & ~evidence.last(1)

    def _number(self, layer: _Layer, marks: Tensor) -> Tensor:
        return layer.evidence.unfold(marks)[:, 0].sum(1)

    def _shares(self, layer: _Layer) -> Tensor:
        """(B,N): of the keys that count, in falling order, what share the first ones hold; 2 behind them."""
        evidence = layer.evidence
        among = evidence.unfold(candidates(evidence, self.what))[:, 0]
        scores = evidence.unfold(layer.scores)[:, 0].masked_fill(~among, float("-inf")).sort(1, descending=True).values
        behind = torch.arange(evidence.n, device=scores.device) >= among.sum(1, keepdim=True)
        scores = scores.masked_fill(behind, 0.0)
        total = scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return (scores / total).cumsum(1).masked_fill(behind, 2.0)

    def _removed(self, shares: Sequence[Tensor], n: Tensor, fixed: Tensor) -> Tensor:
        """(L,) keys of one sample that go from each layer; ``n`` (L,) there are, of which ``fixed`` always stay."""
        if self.ratio is not None:
            target = float(n.sum()) * self.ratio
        elif isinstance(self.keep, int):
            target = float((n - self.keep).clamp(min=0).sum())
        else:
            target = float(n.sum()) - float(n.sum()) * self.keep
        if target <= 0:
            return torch.zeros_like(n)
        low, high, p, found = 0.0, 1.0, 0.5, torch.zeros_like(n)
        for _ in range(_STEPS):
            p = (low + high) / 2
            # Counted on the prefix that reaches p: the keys below it, and one more.
            kept = torch.stack([(share < p).sum() + 1 for share in shares])
            found = (n - kept - fixed).clamp(min=0)
            total = int(found.sum())
            if abs(total - target) < _NEAR:
                break
            low, high = (low, p) if total < target else (p, high)
        if self.exact:
            whole = n.sum() - total_of(self.keep, n[None])[0] if self.ratio is None else torch.tensor([round(target)])
            return allot(found[None], whole.to(n)[None], torch.zeros_like(n)[None], (n - fixed)[None])[0]
        scaled = (found.double() * target / max(1, int(found.sum()))).long()
        return torch.minimum(scaled, n - fixed)

    # -- in decode ---------------------------------------------------------------------------------------------------
    def plan(self, evidence: CacheEvidence) -> Plan:
        if not evidence.step:
            return super().plan(evidence)
        over = above_share(evidence, self.name)
        if not bool(over.any()):
            return Identity.like(evidence.keys)
        left = evidence.prompt_slots
        assert left is not None
        place = left + self.distance if self.distance < 0 else torch.full_like(left, self.distance)
        place = torch.where(place < 1, left // 2, place).minimum(evidence.counts - 1)
        there = evidence.there
        return keep_slots(there & ~(over & (there.long().cumsum(1) - 1 == place)), evidence)
