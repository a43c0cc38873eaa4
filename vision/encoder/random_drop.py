"""Random pruning: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.baseline import draw
from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.schedule import Scheduled

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Scheduled, name="random", title="Random pruning"):
    """Random pruning: every layer drops tokens drawn at random, for every sample anew, reproducibly.

    The draw is a hash of ``seed``, the layer, the token's place and the sample's own coarse content, so that it does
    not depend on the batch, the device or what was drawn before: see :func:`tokenreduce.algorithms.baseline.draw`.
    Slots without a token are left out of the content and are dropped first.

    Args:
        r, inflect, keep: see :class:`~tokenreduce.core.schedule.Scheduled`. At least one unprotected token stays.
        seed: another seed, another draw.

    Raises ``ValueError`` for a negative ``r`` or ``seed``, a bad ``keep`` or a list longer than the model.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.seed, "seed")

    def plan(self, evidence: EncoderEvidence) -> Plan:
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

    def draw(self, evidence: EncoderEvidence) -> Tensor:
        """(B,N) uniform numbers in [0, 2^24), exact in float32."""
        return draw(evidence, self.seed)
