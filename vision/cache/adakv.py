"""Ada-KV (arXiv 2407.11550): the heads of a layer share one budget, and those that need more keys get more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import budget, candidates, check_finite, check_what, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.algorithms.wrapped import OnScorer
from tokenreduce.core.budget import BudgetError, check_count, check_keep, check_share
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["AdaKV"]


@dataclass(frozen=True)
class AdaKV(OnScorer, name="adakv", needs=("attention",), paper="2407.11550", title="Ada-KV"):
    """Ada-KV: behind each layer's prefill, share the budget over the KV heads of a sample by one common threshold.

    ``base`` says what a key is worth, which keys always stay, and how many, by a schedule over layers where it has one.
    With b keys for each of H heads (those that always
    stay not counted), the H b best of all heads are looked for, and head h gets n_h, as many of them as are its own.
    With ``safeguard="floor"``, as the official code does, n_h becomes n_h (1 - a) + floor(b a), rounded half to even,
    so that every head has at least a of its share; the total may fall short of H b by about H keys. With "topk", as
    kvpress does, every head first gets its floor(b a) best, those that always stay among them, and the best of all
    heads fill up to exactly H b. Every head keeps its best by what the base says. Nothing is evicted in decode.

    Args:
        base: the method that ranks keys, with its settings in quotes: ``adakv:base='snapkv:window_size=16'``. The
            official code is ``base='snapkv:kernel_size=7,pooling=maxpool'`` with ``what=all``.
        keep, what: keys of every head on average, see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        floor_alpha: a, in [0, 1]; 1 is the base itself, 0 no safeguard.
        safeguard: "floor" or "topk".
        normalize: multiply a head's scores by the share of its sum that its b best hold, before heads are compared.
        skip: first layers where every head gets b.
        base_capacity: instead of ``keep``, with ``what="all"``: slots of a head, the window included.
        pyram_mode, pyram_beta: let b fall with depth as PyramidKV does, with integer steps, from 2 b - b // beta to
            b // beta.

    Heads that keep different numbers lie in one rectangle, so that memory held is that of the largest head.

    Raises ``ValueError`` for a base that does not rank keys once behind each layer, that brings a budget of its own,
    for numbers out of range, and in a forward for a budget below what always stays.
    """

    base: str = "snapkv"
    keep: int | float = 0.25
    what: str = "visual"
    floor_alpha: float = 0.2
    safeguard: str = "floor"
    normalize: bool = False
    skip: int = 0
    base_capacity: int | None = None
    pyram_mode: bool = False
    pyram_beta: int = 20

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_share(self.floor_alpha, "floor_alpha")
        check_count(self.skip, "skip")
        check_count(self.pyram_beta, "pyram_beta", 1)
        if self.safeguard not in ("floor", "topk"):
            raise ValueError(f"safeguard={self.safeguard!r}: choose 'floor' (the official code) or 'topk' (kvpress)")
        if self.base_capacity is not None:
            check_count(self.base_capacity, "base_capacity", 1)
            if self.what != "all":
                raise ValueError("base_capacity counts all keys of a head; give what=all with it, or keep instead")
        _ = self.inner  # raises for a base that cannot be

    def plan(self, evidence: CacheEvidence) -> Plan:
        inner, among = self.inner, candidates(evidence, self.what)
        wanted = budget(inner.wanted(evidence) if self.base_capacity is None else self.base_capacity, among)
        if bool((wanted >= among.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.keys)
        always = inner.always(evidence)
        fixed = among & always if always is not None else torch.zeros_like(among)
        free, wanted = among & ~fixed, wanted - fixed.sum(1, keepdim=True)
        if bool((wanted < 0).any()):
            raise BudgetError(
                f"the budget is below the {int(fixed.sum(1).max())} keys that always stay (window and sinks); give a "
                f"larger keep, or smaller ones in base={self.base!r}"
            )
        if self.pyram_mode:
            wanted = self._pyramid(wanted, free.sum(1, keepdim=True), evidence)
        scores, mass = inner.importance(evidence), inner.mass(evidence)
        check_finite(scores, free)
        check_finite(mass, free)
        if evidence.layer < self.skip:
            counts = wanted
        elif self.safeguard == "floor":
            counts = self._floored(mass, free, wanted, evidence)
        else:
            counts = self._guarded(mass, free, wanted, fixed, evidence)
        return keep_slots(fixed | best(scores, free, counts) | (evidence.there & ~among), evidence)

    def _pyramid(self, wanted: Tensor, most: Tensor, evidence: CacheEvidence) -> Tensor:
        low = wanted // self.pyram_beta
        high = torch.minimum(2 * wanted - low, most)
        low = torch.where(2 * wanted - low >= most, 2 * wanted - high, low)
        step = (high - low) // max(1, evidence.depth - 1)
        return torch.minimum(high - evidence.layer * step, most)

    def _common(self, mass: Tensor, free: Tensor, wanted: Tensor, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N) bool: the best of all heads of a sample together, as many as their ``wanted`` (B*Hkv,1) sum to."""
        total = evidence.unfold(wanted).sum(1)
        chosen = best(evidence.unfold(mass).flatten(1), evidence.unfold(free).flatten(1), total)
        return chosen.view_as(free)

    def _floored(self, mass: Tensor, free: Tensor, wanted: Tensor, evidence: CacheEvidence) -> Tensor:
        if self.normalize:
            held = mass.masked_fill(~best(mass, free, wanted), 0.0).sum(1, keepdim=True)
            whole = mass.masked_fill(~free, 0.0).sum(1, keepdim=True)
            mass = torch.where(whole > 0, mass * held / whole, mass)
        counts = self._common(mass, free, wanted, evidence).sum(1, keepdim=True)
        floor = (wanted.double() * self.floor_alpha).floor().float()
        counts = (counts.float() * (1 - self.floor_alpha) + floor).round().long()
        # Nothing goes where a head has room for all of its keys.
        most = free.sum(1, keepdim=True)
        return torch.where(wanted >= most, most, counts)

    def _guarded(self, mass: Tensor, free: Tensor, wanted: Tensor, fixed: Tensor, evidence: CacheEvidence) -> Tensor:
        """Keys that each head gets beside those that always stay."""
        held = fixed.sum(1, keepdim=True)
        safe = ((wanted + held).double() * self.floor_alpha).floor().long() - held
        own = best(mass, free, safe)
        rest = wanted - own.sum(1, keepdim=True)
        return (own | self._common(mass, free & ~own, rest, evidence)).sum(1, keepdim=True)
