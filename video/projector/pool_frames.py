"""Average pooling over time: neighbouring frames become one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tokenreduce.algorithms.baseline import windows
from tokenreduce.algorithms.temporal import Temporal, frames_of
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Merge, Plan

__all__ = ["PoolFrames"]


@dataclass(frozen=True)
class PoolFrames(Temporal, name="pool-frames", title="Average pooling over frames"):
    """Pool over frames: the plain mean of the tokens at the same place of neighbouring frames replaces them.

    Frames are cut into as few bands as have room for ``keep`` tokens, of lengths that differ by one at most, so that
    places stay apart as far as they can. Where ``keep`` is a whole number of frames, every place of a band is one
    output; otherwise tokens are shared out evenly among the bands (the first take the rest), and neighbouring places
    are pooled too, in cells nearest to squares: see :func:`tokenreduce.algorithms.baseline.windows`. Fewer tokens than
    a frame has are thus the cells of the mean of all frames. An output stands at the place of its first token, and
    outputs follow by time, row and column.

    Args:
        keep: visual tokens of a video that stay, a count or a ratio; one in ``frames`` without it.
        frames: frames that become one; read only without ``keep``.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these, and for frames whose tokens share a place.
    """

    keep: int | float | None = None
    frames: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        check_count(self.frames, "frames", 1)
        if self.keep is None:
            object.__setattr__(self, "keep", 1 / self.frames)
        super().__post_init__()

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        p, device = evidence.prefix, evidence.x.device
        bands = -(-keep // frames_of(evidence)[1])
        assign = torch.cat([torch.arange(p, device=device), windows(evidence, keep, bands) + p])
        return Merge.from_assignment(assign.expand(evidence.batch, -1), p + keep, by_size=False)
