"""Bases of methods that go on evicting while they decode: one number for each key, and a budget fixed at the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.algorithms.keys import budget, covered, keep_best_slots, left_by_prompt, standing
from tokenreduce.core.budget import Keep, check_count
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["Accumulating", "DecodeScorer", "HeavyHitters", "part"]


@dataclass(frozen=True)
class DecodeScorer(KeyScorer):
    """A :class:`KeyScorer` that, with ``what="all"``, cuts the cache back to the budget as it grows.

    A ratio is of the prompt's keys, as many as its layer holds of each sample, and stays what it was there. With
    ``what="visual"`` all text stays, what is generated too, so that nothing more goes while decoding.

    Args:
        interval: decode steps from one cut to the next; None cuts behind the prompt only.
    """

    interval: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval is not None:
            check_count(self.interval, "interval", 1)

    def every(self) -> int:
        return (self.interval or 0) if self.what == "all" else 0

    def capacity(self, evidence: CacheEvidence) -> Keep | Tensor:
        """How many of the keys that ``what`` counts stay in this step: a count, a ratio, or one for each row
        (B*Hkv,1)."""
        return standing(self.keep, evidence) if self.what == "all" else self.keep

    def plan(self, evidence: CacheEvidence) -> Plan:
        if evidence.step and self.what == "visual":
            return Identity.like(evidence.keys)
        capacity = self.capacity(evidence)
        if covered(capacity, evidence, self.what):
            return Identity.like(evidence.keys)
        scores, always = self.importance(evidence), self.always(evidence)
        return keep_best_slots(scores, capacity, evidence, what=self.what, always=always)


@dataclass(frozen=True)
class Accumulating(DecodeScorer):
    """What a key gets from the queries adds up from the prompt on, and those with most of it stay.

    A method says what a step adds (:meth:`gained`) and, if it forgets, what is left of the steps before
    (:meth:`faded`).
    """

    def gained(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N) float32: what every key got from the queries of this step."""
        raise NotImplementedError("abstract")

    def faded(self, scores: Tensor, evidence: CacheEvidence) -> Tensor:
        """The scores of the steps before, as they count now."""
        return scores

    def score(self, evidence: CacheEvidence) -> Tensor:
        return evidence.once(self, lambda: self._added(evidence))

    def _added(self, evidence: CacheEvidence) -> Tensor:
        gained = self.gained(evidence).masked_fill(~evidence.there, 0.0)
        return gained if evidence.scores is None else self.faded(evidence.scores.float(), evidence) + gained

    def importance(self, evidence: CacheEvidence) -> Tensor:
        return self.score(evidence)


@dataclass(frozen=True)
class HeavyHitters(Accumulating):
    """With ``what="all"``, the recent window and in front of it the keys with the largest score.

    Args:
        keep, what, interval: see :class:`DecodeScorer`.
        recent_share: with ``what="all"``, share of the budget that is the last tokens, rounded down.
        recent_size: instead, with ``what="all"``: last tokens that stay, inside the budget.
        hh_size: instead of ``keep``, together with ``recent_size``: keys that stay in front of the window.
        heavy_ratio, recent_ratio: instead of all these: both in shares of the prompt, each rounded down. In decode the
            budget is what it was behind the prompt, and the window the nearest number to its part of it.
    """

    recent_share: float = 0.5
    recent_size: int | None = None
    hh_size: int | None = None
    heavy_ratio: float | None = None
    recent_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"recent_share is a number in [0, 1], not {self.recent_share!r}")
        given = [n for n in ("recent_size", "hh_size", "heavy_ratio", "recent_ratio") if getattr(self, n) is not None]
        if given and self.what != "all":
            raise ValueError(f"{given[0]} counts all keys of a head; give what=all with it, or keep instead")
        for name in given:
            value = getattr(self, name)
            if name.endswith("size"):
                check_count(value, name)
            elif not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of the prompt in [0, 1], not {value!r}")
        sizes, ratios = (self.hh_size, self.recent_size), (self.heavy_ratio, self.recent_ratio)
        if sizes != (None, None) and ratios != (None, None):
            raise ValueError("give hh_size and recent_size, or heavy_ratio and recent_ratio, not both")
        if self.hh_size is not None and not self.hh_size + (self.recent_size or 0):
            raise ValueError("hh_size and recent_size are the budget: at least one key")
        if self.hh_size is not None and self.recent_size is None:
            raise ValueError("hh_size and recent_size are given together")
        if (self.heavy_ratio is None) != (self.recent_ratio is None):
            raise ValueError("heavy_ratio and recent_ratio are given together")
        if ratios != (None, None) and not 0 < (self.heavy_ratio or 0) + (self.recent_ratio or 0) <= 1:
            raise ValueError("heavy_ratio and recent_ratio are together above 0 and at most 1")

    def capacity(self, evidence: CacheEvidence) -> Keep | Tensor:
        if self.hh_size is not None and self.recent_size is not None:
            return self.hh_size + self.recent_size
        if self.heavy_ratio is None or self.recent_ratio is None:
            return super().capacity(evidence)
        if evidence.step:
            return left_by_prompt(evidence)
        return (_floor(self.heavy_ratio, evidence) + _floor(self.recent_ratio, evidence)).clamp(min=1)

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        if self.what != "all":
            return None
        if self.recent_size is not None:
            return evidence.last(self.recent_size)
        capacity = self.capacity(evidence)
        if self.heavy_ratio is None or self.recent_ratio is None:
            return evidence.last(part(capacity, self.recent_share, evidence))
        if not evidence.step:
            return evidence.last(_floor(self.recent_ratio, evidence))
        share = self.recent_ratio / (self.heavy_ratio + self.recent_ratio)
        return evidence.last(part(capacity, share, evidence, 0.5))


def _floor(ratio: float, evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,1): ``ratio`` of the keys, rounded down."""
    return (evidence.counts.double() * ratio).long()


def part(capacity: Keep | Tensor, share: float, evidence: CacheEvidence, up: float = 0.0) -> Tensor:
    """(B*Hkv,1): ``share`` of the budget of all keys, rounded down once ``up`` is added. A count is itself where a row
    has fewer keys."""
    if isinstance(capacity, int):
        whole = torch.full_like(evidence.counts, capacity)
    else:
        whole = budget(capacity, evidence.there)
    return (whole.double() * share + up + 1e-9).long()
