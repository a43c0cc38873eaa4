"""Token shuffle of TimeSuite (arXiv 2410.19702): neighbours in the sequence become their mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tokenreduce.algorithms.temporal import Temporal
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Merge, Plan

__all__ = ["TokenShuffle"]


@dataclass(frozen=True)
class TokenShuffle(Temporal, name="token-shuffle", paper="2410.19702", title="Token shuffle (TimeSuite)"):
    """Token shuffle: the tokens of a video in one sequence are cut into groups of consecutive ones, and the plain mean
    of a group goes through the projector.

    This is what the trained layer of TimeSuite, which joins m tokens along the channels, computes before its first
    training step, provided that the projector is linear; with any other the means of features are a port of ours. Its
    position encoding adds nothing at that step. Made for queries of a Q-Former: on patches the groups are neighbours
    of one row, and average pooling (``pool``, ``pool-frames``) is the better baseline. Groups take no notice of frames.

    Exactly ``keep`` groups: token j of N goes to group floor(j keep / N), so that lengths differ by one at most and are
    m where m divides N and N / m stay. (Officially N must be a multiple of m.) An output stands at the place of its
    group's first token. Images are left as they are, as in the paper, which repeats their tokens m times first.

    Args:
        keep: visual tokens of a video that stay, a count or a ratio; one in ``m`` without it.
        m: tokens of a group; read only without ``keep``.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    space: ClassVar[str] = "vision"

    keep: int | float | None = None
    m: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        check_count(self.m, "m", 1)
        if self.keep is None:
            object.__setattr__(self, "keep", 1 / self.m)
        super().__post_init__()

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        p, n, device = evidence.prefix, evidence.n - evidence.prefix, evidence.x.device
        group = torch.arange(n, device=device) * keep // n
        assign = torch.cat([torch.arange(p, device=device), group + p])
        return Merge.from_assignment(assign.expand(evidence.batch, -1), p + keep, by_size=False)
