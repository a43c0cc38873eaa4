"""STTM (arXiv 2507.07990), before the language model: quadtrees in every frame, groups of their leaves over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.algorithms.quadtree import Forest, check_forest, merged
from tokenreduce.algorithms.temporal import Temporal, by_frame, frame_grid, joined
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["STTM"]


@dataclass(frozen=True)
class STTM(Temporal, name="sttm", paper="2507.07990", title="STTM"):
    """STTM: alike places of a frame become one leaf of a quadtree, alike leaves of adjacent frames one token.

    A pyramid halves the sides of the frame (rounded up) until one is 2; values are means of their children, where an
    odd side leaves its first row or column unpaired. From level ``root_level`` (0 is the coarsest) down, a node whose
    cosine to each of its children is at least ``theta_s`` is a leaf; else its children are looked at, down to single
    tokens. Leaves of adjacent frames of which one lies in the other are linked where their cosine is at least
    ``theta_t``; a group of linked leaves becomes one token at the place of the first, the plain mean of its leaves.
    The text takes no part, so that a result serves other questions on the video.

    How many stay follows from the video: 0.85 and 0.80 leave about 50 % and 30 % on LLaVA-Video. ``keep`` asks for a
    number instead (ours): both thresholds are moved alike until as few tokens as possible, but no fewer, are left, and
    of these those that stand for the fewest places go.

    The official code merges before layer 2 of the language model; ``sttm-llm`` does that. Two of its habits are kept,
    with an option each: at odd borders it also compares a node with the corner of the frame (``border="valid"`` does
    not), and its rounds of grouping may end while linked leaves are in two groups (``components=True`` goes on). A grid
    with a side of 1 or 2, or frames whose tokens fill no grid, are merged over time only. Sums are float32.

    Args:
        keep: tokens of a video that stay, or None for what the thresholds leave.
        theta_s, theta_t: cosines; ``theta_t`` of 0 or below merges nothing over time. The authors tune it from 0.50 to
            0.65.
        root_level: level of the pyramid that the trees start from.
        border: "official" or "valid", see above.
        components: whether groups are all that is linked.
        weighted_avg: values are means of the tokens they cover instead of means of means; differs at odd borders only.
        head_dim: cosines per head of so many channels, averaged; None is all channels at once.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    theta_s: float = 0.85
    theta_t: float = 0.6
    root_level: int = 1
    border: str = "official"
    components: bool = False
    weighted_avg: bool = False
    head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_forest(self.theta_s, self.theta_t, self.root_level, self.border, self.head_dim)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = by_frame(evidence)
        grid = frame_grid(evidence) or (1, x.shape[2])
        samples = []
        for row in x:
            forest = Forest.of(row.unflatten(1, grid), self.root_level, self.border, self.weighted_avg, self.head_dim)
            wanted = None if self.keep is None else keep
            head, weight = merged(forest, self.theta_s, self.theta_t, wanted, self.components)
            samples.append((head, weight, None))
        return joined(evidence, samples)
