"""Random pruning: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.budget import check_count
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Identity, Plan, Prune
from tokenreduce.schedule import Scheduled
from tokenreduce.scoring import finite, select

__all__ = ["Random"]

_BITS = 0xFFFFFFFF
#: Channels whose means identify a sample, and quantisation steps per root mean square of its features.
_CHANNELS, _STEPS = 4, 16


@dataclass(frozen=True)
class Random(Scheduled, name="random", title="Random pruning"):
    """Random pruning: every layer drops tokens drawn at random, for every sample anew, reproducibly.

    The draw is a hash of ``seed``, the layer, the token's place and the sample's own content, and of nothing else. A
    random generator would give a sample other tokens in another batch or at another place of it, on another device or
    in a compiled model, and would make the plan depend on what was drawn before. Content enters as the means over
    tokens of the first four channels, divided by the root mean square of the sample's features and rounded to 1/16:
    coarse, so that the last bits of a feature, which differ between devices and batch sizes, change no draw except
    where a mean happens to lie on a rounding edge. Samples with equal rounded means get equal draws. Slots without a
    token are left out of the means and are dropped first.

    Args:
        r, inflect, keep: see :class:`~tokenreduce.schedule.Scheduled`. At least one unprotected token stays.
        seed: another seed, another draw.

    Raises ``ValueError`` for a negative ``r`` or ``seed``, a bad ``keep`` or a list longer than the model.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.seed, "seed")

    def plan(self, evidence: Evidence) -> Plan:
        free = evidence.free()
        wanted = self.amount(evidence)
        r = min(wanted, max(0, free - 1))
        if r < wanted:
            evidence.note(
                f"random: r={wanted} clamped to {r} at layer {evidence.layer} ({free} tokens may go, one stays)",
                "random: r is more than some layers can remove and is clamped there; tr.record(model) notes where",
            )
        if r == 0:
            return Identity.like(evidence.x)
        return Prune(evidence.n, select(self.draw(evidence), free - r, evidence))

    def draw(self, evidence: Evidence) -> Tensor:
        """(B,N) uniform numbers in [0, 2^24), exact in float32."""
        start = _mix((self.seed ^ (self.seed >> 32)) & _BITS, evidence.layer + 1)
        state = torch.full((evidence.batch,), start, dtype=torch.int64, device=evidence.x.device)
        for part in _content(evidence).unbind(1):
            state = _scramble(state ^ (part & _BITS))
        place = _scramble(torch.arange(1, evidence.n + 1, device=state.device))
        return (_scramble(state.unsqueeze(1) ^ place) >> 8).float()


def _content(evidence: Evidence) -> Tensor:
    """(B,4) int64: rounded channel means that tell samples apart."""
    x = evidence.x.detach().float()
    if evidence.valid is None:
        mean, power = x.mean(1), x.square().mean((1, 2))
    else:
        there = evidence.valid.unsqueeze(-1)
        tokens = evidence.valid.sum(1, keepdim=True).clamp(min=1)
        x = torch.where(there, x, 0.0)
        mean, power = x.sum(1) / tokens, x.square().sum((1, 2)) / (tokens.squeeze(1) * x.shape[2])
    share = mean[:, :_CHANNELS] / power.sqrt().clamp(min=1e-12).unsqueeze(1)
    # The power is NaN where any feature is; without this check a NaN elsewhere would go unnoticed.
    share = finite(torch.where(power.isnan().unsqueeze(1), power.unsqueeze(1), share), evidence)
    return (share * _STEPS).round().clamp(-(2**20), 2**20).long()


def _scramble(h: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift and multiply) in int64, where no product overflows."""
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & _BITS
    return h ^ (h >> 16)


def _mix(a: int, b: int) -> int:
    """The same hash of two Python integers."""
    h = a
    for part in (0x9E3779B9, b):
        h ^= part & _BITS
        for _ in range(2):
            h = ((h ^ (h >> 16)) * 0x45D9F3B) & _BITS
        h ^= h >> 16
    return h
