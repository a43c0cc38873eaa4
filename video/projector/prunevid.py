"""PruneVid (arXiv 2412.16117): clusters of static tokens over a segment, and of moving ones within every frame."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.clustering import clusters
from tokenreduce.algorithms.scoring import unit
from tokenreduce.algorithms.temporal import Temporal, by_frame, frames_of, segments
from tokenreduce.algorithms.views import apportion
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Mix, Plan

__all__ = ["PruneVid", "contiguous", "likeness"]

#: Distances of a block of frames that are held at once.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class PruneVid(Temporal, name="prunevid", paper="2412.16117", title="PruneVid"):
    """PruneVid's merging: scenes of the video, their static tokens merged over time, all tokens merged in space.

    Frame means are clustered by DPC-KNN into T * temporal_segment_ratio clusters, and these made segments of frames in
    a row by :func:`contiguous`. A place is static in a segment when the mean cosine of its tokens over all pairs of
    frames is above ``tau``: one token for the segment. Other places have one for every frame. The static tokens of a
    segment, and the other tokens of every frame, are then DPC-KNN clusters with plain means, ``cluster_ratio`` of
    them, unless there are no more than ``min_group``. Sizes do not weigh in; an output is the plain mean of all it
    stands for, which ``plan.sources()`` says: static outputs have sources in every frame of their segment. Order: per
    segment static outputs and then those of each frame, in groups that were clustered best centre first, else as in
    the frame. An output's place is its centre's, of static ones that in the first frame of the segment.

    Different from the official code: segments of one frame have no static places, fewer than ``k`` tokens or frames
    are no error, at least one segment and one cluster of a group is left, each video of a batch has its own segments,
    and equally dense tokens count the lower index as the denser.

    Args:
        keep: None leaves what the rule above gives, for every sample alone (empty slots are on the left). A count or
            ratio is shared out among the groups: one output each, the rest in proportion to what the rule would give
            them beyond that, so that the number that the rule gives is the rule itself. For more outputs than the
            groups have tokens, the least similar of the static places are not merged over time. With fewer outputs
            than groups, groups evenly spread over the video have one each and the tokens of the others are dropped.
        temporal_segment_ratio: clusters of frames per frame, rounded down.
        tau: mean cosine above which a place is static.
        cluster_ratio: clusters per token of a group, rounded down.
        k: neighbours in the density, the point itself included; at most all there are.
        min_group: groups of at most so many tokens are not clustered (official: 14), unless ``keep`` says so.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    temporal_segment_ratio: float = 0.25
    tau: float = 0.8
    cluster_ratio: float = 0.5
    k: int = 7
    min_group: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temporal_segment_ratio", "cluster_ratio"):
            ratio = getattr(self, name)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
                raise ValueError(f"{name} is in (0, 1], not {ratio!r}")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not -1 <= self.tau <= 1:
            raise ValueError(f"tau is a cosine in [-1, 1], not {self.tau!r}")
        check_count(self.k, "k", 1)
        check_count(self.min_group, "min_group")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        frames_of(evidence)
        wanted = None if self.keep is None else keep
        return Mix.from_samples(evidence.n, [self._sample(x, wanted, evidence.prefix) for x in by_frame(evidence)])

    def segments(self, x: Tensor) -> list[tuple[int, int]]:
        """First frame, and first behind the last, of the segments of ``x`` (T,n,C)."""
        wanted = max(1, _part(len(x), self.temporal_segment_ratio))
        labels = contiguous(clusters(x.mean(1)[None], wanted, self.k)[1][0].tolist())
        return segments([i for i, (a, b) in enumerate(itertools.pairwise(labels)) if a != b], len(labels))

    def static(self, x: Tensor, bounds: list[tuple[int, int]], keep: int | None) -> Tensor:
        """(S,n) bool: places that are static in each segment of ``x`` (T,n,C), and leave at least ``keep`` tokens."""
        alike = torch.stack([likeness(x[first:last]) for first, last in bounds])
        out = alike > self.tau
        length = torch.tensor([[last - first] for first, last in bounds], device=x.device)
        lost = out * (length - 1)
        missing = 0 if keep is None else keep - (x.shape[0] * x.shape[1] - int(lost.sum()))
        if missing > 0:
            order = alike.masked_fill(~out, float("inf")).flatten().argsort(stable=True)
            won = lost.flatten()[order].cumsum(0)
            out.view(-1)[order[: int((won < missing).sum()) + 1]] = False
        return out

    def numbers(self, sizes: list[int], keep: int | None) -> list[int]:
        """Outputs of groups of so many tokens: what the rule gives, or its ``keep`` in all."""
        ruled = [n if n <= self.min_group else max(1, _part(n, self.cluster_ratio)) for n in sizes]
        if keep is None:
            return ruled
        many = len(sizes)
        if keep < many:
            chosen = {(2 * i + 1) * many // (2 * keep) for i in range(keep)}
            return [int(i in chosen) for i in range(many)]
        extra = torch.tensor([ruled]) - 1
        return (1 + apportion(keep - many, extra, torch.tensor(sizes) - 1))[0].tolist()

    def _sample(self, x: Tensor, keep: int | None, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The entries of one video ``x`` (T,n,C), see :meth:`Mix.from_samples`, behind ``p`` protected tokens."""
        n = x.shape[1]
        index = p + torch.arange(len(x) * n, device=x.device).view(len(x), n)
        # Sheets (tokens (G,F,m), features (G,m,C)): G groups of m clustered features, each the mean of F frames.
        sheets = []
        bounds = self.segments(x)
        for (first, last), static in zip(bounds, self.static(x, bounds, keep), strict=True):
            block, own = x[first:last], index[first:last]
            if bool(static.any()):
                sheets.append((own[None, :, static], block[:, static].mean(0, keepdim=True)))
            if not bool(static.all()):
                sheets.append((own[:, None, ~static], block[:, ~static]))
        counts = self.numbers([f.shape[1] for _, f in sheets for _ in f], keep)
        starts = list(itertools.accumulate(counts, initial=p))
        lead = torch.arange(p, device=x.device)
        kept = torch.cat([lead, lead.new_zeros(sum(counts))])
        src, dst, weight = [lead], [lead], [x.new_ones(p)]
        begin = 0
        for tokens, features in sheets:
            mine, at = counts[begin : begin + len(features)], starts[begin : begin + len(features)]
            begin += len(features)
            many = max(1, _BLOCK // features.shape[1] ** 2)
            for count in sorted({*mine} - {0}):
                rows = [g for g, c in enumerate(mine) if c == count]
                for part in (rows[i : i + many] for i in range(0, len(rows), many)):
                    centres, group = self._cluster(features[part], count)
                    slot = torch.tensor([at[g] for g in part], device=x.device)[:, None]
                    members = tokens[part]
                    kept[slot + torch.arange(count, device=x.device)] = members[:, 0].gather(1, centres)
                    size = torch.zeros_like(centres).scatter_add(1, group, torch.ones_like(group)) * members.shape[1]
                    src.append(members.flatten())
                    dst.append((slot + group)[:, None].expand_as(members).flatten())
                    weight.append((1 / size.gather(1, group))[:, None].expand_as(members).flatten())
        return kept, torch.cat(src), torch.cat(dst), torch.cat(weight)

    def _cluster(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(G,count) centres and (G,m) clusters of ``x`` (G,m,C); tokens that all stay, stay in order."""
        if count == x.shape[1]:
            alone = torch.arange(count, device=x.device).expand(len(x), -1)
            return alone, alone
        return clusters(x, count, self.k)


def _part(n: int, ratio: float) -> int:
    """``ratio`` of ``n``, rounded down but for the rounding of the product."""
    return int(n * ratio + 1e-6)


def likeness(x: Tensor) -> Tensor:
    """(n,) float64 mean cosine over all pairs of the frames ``x`` (W,n,C); -inf for one frame."""
    w = len(x)
    if w == 1:
        return torch.full_like(x[0, :, 0], float("-inf"), dtype=torch.float64)
    each = unit(x)
    # The square of the sum of unit vectors holds all pairs, and every frame with itself.
    pairs = each.sum(0).double().square().sum(-1) - each.square().sum(-1).double().sum(0)
    return (pairs / (w * (w - 1))).clamp(max=1)


def contiguous(labels: list[int]) -> list[int]:
    """Labels of frames such that each belongs to a run of some length, as PruneVid makes segments of clusters.

    A label keeps its longest run, or runs where several are as long, but none of one frame. Every stretch of other
    frames, from the first to the last, takes the label of the longer of the runs beside it (the left one has grown by
    the stretches before it), at ties the left one; without any run all frames are one segment.

    >>> contiguous([0, 0, 1, 0, 2, 2, 2]), contiguous([0, 1, 2])
    ([0, 0, 2, 2, 2, 2, 2], [0, 0, 0])
    """
    runs = [(label, len(list(run))) for label, run in itertools.groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 2))
    stays = [label if length == longest[label] else None for label, length in runs for _ in range(length)]
    marked = [(label, len(list(run))) for label, run in itertools.groupby(stays)]
    out: list[tuple[int, int]] = []
    for i, (own, length) in enumerate(marked):
        if own is None:
            left, right = out[-1] if out else (0, 0), marked[i + 1] if i + 1 < len(marked) else (0, 0)
            own = left[0] if left[1] >= right[1] else right[0]
        if out and out[-1][0] == own:
            length += out.pop()[1]
        out.append((own or 0, length))
    return [label for label, length in out for _ in range(length)]
