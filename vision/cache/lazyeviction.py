"""LazyEviction (arXiv 2506.15969): tokens that matter again after a while stay as long as their while is not over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import carried
from tokenreduce.algorithms.keys import budget, candidates, check_finite, check_what, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_count, check_keep, check_share
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["LazyEviction"]


@dataclass(frozen=True)
class LazyEviction(CacheReducer, name="lazyeviction", needs=("attention",), paper="2506.15969", title="LazyEviction"):
    """LazyEviction: the prompt stays whole; in decode, evict every ``window`` steps, by how tokens come back.

    Every slot has the step of its last activation TS and its largest recurrence interval MRI. In step t, a slot that
    gets at least ``alpha`` of the new token's attention, averaged over the query heads of its KV head, has
    MRI = max(MRI, t - TS), and then TS = t. Every ``window`` steps, a head with more keys than the budget keeps the
    last ``window`` slots and those with the largest 2 sigmoid(-(t - TS) / MRI) + 2 sigmoid(-MRI / window): back before
    long, and often. Slots that never came back (MRI 0) count 0. Between evictions the cache grows; short answers never
    reach one.

    Args:
        keep: the budget: a count, or with ``what="visual"`` a ratio of the visual keys that the prompt had, where all
            text and all new tokens stay; with "all" a ratio of all tokens seen. The paper has 0.3 to 0.5.
        what: "visual", or "all" as published.
        window: steps from one eviction to the next, and last slots that stay.
        alpha: threshold of an activation, in [0, 1].
        relative: whether the threshold is ``alpha`` divided by the number of slots.

    The authors' code was not at hand. Open in the sources, and decided here: the second term's form; ``window`` and
    ``alpha``; statistics of each KV head; a slot of the prompt starts with TS 0, which is the prompt's end, a new token
    with its own step; the window of the last slots counts inside the budget, which it may exceed.

    Raises ``ValueError`` for numbers out of range, and a count of all keys that is not above the window.
    """

    keep: int | float = 0.5
    what: str = "visual"
    window: int = 32
    alpha: float = 0.001
    relative: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.window, "window", 1)
        if self.relative:
            if self.alpha < 0:
                raise ValueError(f"alpha is a number >= 0, not {self.alpha!r}")
        else:
            check_share(self.alpha, "alpha")
        if self.what == "all" and isinstance(self.keep, int) and self.keep <= self.window:
            raise ValueError(f"keep={self.keep} is not above window={self.window}, which always stays")

    def moment(self) -> str:
        return "never"

    def every(self) -> int:
        return self.window

    def query_rows(self) -> int:
        return 1

    def score(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N,3): step of the last activation, largest recurrence interval, and at every slot the number of
        visual keys that the prompt had."""
        old, t = evidence.scores, float(evidence.step)
        if old is None:
            old = torch.zeros(*evidence.keys.shape[:2], 3, device=evidence.keys.device)
        last, longest = old[..., 0], old[..., 1]
        if evidence.step:
            row = evidence.rows(1)[:, :, -1].mean(1)
            check_finite(row, evidence.there)
            least = self.alpha / evidence.counts if self.relative else self.alpha
            new = evidence.last(1)
            active = (row >= least) & evidence.there & ~new
            longest = torch.where(active, torch.maximum(longest, t - last), longest).masked_fill(new, 0.0)
            last = last.masked_fill(active | new, t)
        whole = self._visual(evidence).to(last) if self.what == "visual" else torch.zeros_like(last[:, :1])
        return torch.stack([last, longest, whole.expand_as(last)], -1)

    def _visual(self, evidence: CacheEvidence) -> Tensor:
        present = evidence.visual.sum(1, keepdim=True)
        return torch.maximum(carried(evidence, present), present)

    def plan(self, evidence: CacheEvidence) -> Plan:
        if not evidence.step:
            return Identity.like(evidence.keys)
        among = candidates(evidence, self.what)
        if isinstance(self.keep, int):
            wanted = budget(self.keep, among)
        else:
            whole = evidence.seen if self.what == "all" else self._visual(evidence)
            wanted = (self.keep * whole.double() + 0.5).long().clamp(min=1)
        if bool((wanted >= among.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.keys)
        last, longest, _ = self.score(evidence).unbind(-1)
        again = 2 * torch.sigmoid((last - evidence.step) / longest.clamp(min=1))
        often = 2 * torch.sigmoid(-longest / self.window)
        worth = torch.where(longest > 0, again + often, 0.0)
        window = evidence.last(self.window)
        free = among & ~window
        stay = best(worth, free, wanted - (among & window).sum(1, keepdim=True))
        return keep_slots(stay | (evidence.there & ~free), evidence)
