"""HoliTom (arXiv 2505.21334), the part before the language model: segments that save most, static places merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.clustering import leaders
from tokenreduce.algorithms.projector import Salient
from tokenreduce.algorithms.temporal import Temporal, adjacent, by_frame, joined
from tokenreduce.core.budget import check_count, proportional
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["HoliTom"]


@dataclass(frozen=True)
class HoliTom(Temporal, Salient, name="holitom", needs=("tower",), paper="2505.21334", title="HoliTom"):
    """HoliTom's outer part: the segmentation that saves most, static places averaged over time, then merged or pruned.

    A place is static in a segment where the cosine of its tokens in all adjacent frames exceeds ``tau``. A dynamic
    programme finds the segments for which one copy of every static token saves most; ties prefer a frame alone, then
    the shorter segment. The tokens left share ``keep`` at one ratio: the static ones of a segment (means over its
    frames) become DPC-KNN clusters, where a centre has weight ``beta`` and its members share the rest (alone it is
    itself); the others, frame by frame, are ranked by attention, and with ``d`` > 0 a part of the frame's number is
    clusters of those that are not kept, under the same rule. Order: the static tokens of a segment at their places in
    its first frame, then the others frame by frame, those kept before those merged, raster order in each.

    The merging inside the language model is a method of its own; this one alone is "HoliTom without M" of the paper.

    Different from the official code: exactly ``keep`` tokens come out, where it rounds the static ones of a segment and
    rounds up in every frame. Static groups and frames get their numbers in proportion to their tokens, rounded down,
    and one more for the largest remainders (ties: the first in time, static before the frames); a small ``keep`` leaves
    some of them nothing. Where averaging over time alone leaves fewer than ``keep``, the least similar links of static
    places are cut until it leaves as many; a piece that starts later stands first in the frame where it starts.
    ``d`` > 0 works (it crashes there); the kept are rounded half up. Density ties go to the lower index instead of
    noise, and a zero token is similar to none.

    Args:
        keep: tokens of a video that stay; 0.10 to 0.25 in the paper.
        tau: how similar static tokens are; the paper uses 0.65 at ``keep=0.1`` and 0.8 above, the code 0.8.
        beta: weight of a cluster's centre, in [0, 1].
        d: share of a frame's number that is merged, not kept, in [0, 1].
        k: neighbours in the density; at most the number of centres.
        max_window: longest segment, in frames.
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`; the paper has the attention received
            (SigLIP).
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.1
    tau: float = 0.8
    beta: float = 0.6
    d: float = 0.0
    k: int = 7
    max_window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tau", -1), ("beta", 0), ("d", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
                raise ValueError(f"{name} is in [{least}, 1], not {value!r}")
        check_count(self.k, "k", 1)
        check_count(self.max_window, "max_window", 1)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = by_frame(evidence)
        scores = self.saliency(evidence).view(x.shape[:3])
        return joined(evidence, [self._sample(*one, keep) for one in zip(x, adjacent(x), scores, strict=True)])

    def _sample(self, x: Tensor, similarity: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Heads, weights and ranks (see :func:`joined`) of ``x`` (T,n,C); similarity (T-1,n)."""
        t, n = x.shape[:2]
        spans, linked = _segments(similarity > self.tau, self.max_window)
        over = keep - (t * n - int(linked.sum()))
        static = torch.zeros(t, n, dtype=torch.bool, device=x.device)
        static[1:] |= linked
        static[:-1] |= linked
        if over > 0:
            weakest = similarity.masked_fill(~linked, float("inf")).flatten().argsort(stable=True)[:over]
            linked = linked.flatten().index_fill(0, weakest, False).view(t - 1, n)
        frame = torch.arange(t, device=x.device)[:, None].expand(t, n)
        first = frame.clone()
        first[1:] = torch.where(linked, 0, frame[1:])
        head = first.cummax(0).values * n + torch.arange(n, device=x.device)
        weight = 1 / torch.bincount(head.flatten(), minlength=t * n)[head].float()
        rank = (~static).long()
        if over < 0:
            dynamic = (~static).sum(1).tolist()
            still = {a: int(static[a].sum()) for a, b in spans if b - a > 1}
            shares = iter(proportional(keep, [m for a, b in spans for m in (still.get(a, 0), *dynamic[a:b])]))
            counts = [0] * t
            for a, b in spans:
                count = next(shares)
                counts[a:b] = [next(shares) for _ in range(a, b)]
                if still.get(a, 0):
                    where = static[a].nonzero().flatten()
                    centre, part = self._merge(x[a:b, where].mean(0), count)
                    head[a:b, where] = torch.where(centre < 0, -1, a * n + where[centre])
                    weight[a:b, where] *= part
            self._frames(x, scores, static, counts, (head, weight, rank))
        rank = (frame * 3 + rank) * n + torch.arange(n, device=x.device)
        return head.flatten(), weight.flatten(), rank.flatten()

    def _frames(
        self, x: Tensor, scores: Tensor, static: Tensor, counts: list[int], out: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Leave ``counts`` of every frame's tokens that are not ``static``, in heads, weights and ranks ``out``."""
        head, weight, rank = out
        best = [int(count * (1 - self.d) + 0.5) for count in counts]
        # Two sorts, so that static tokens come last whatever the scores are.
        order = scores.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, static.gather(1, order).long().argsort(dim=1, stable=True))
        stays = order.argsort(dim=1) < torch.tensor(best, device=x.device)[:, None]
        others = ~static & ~stays
        head[others] = -1
        for f, count in enumerate(counts):
            if count > best[f]:
                where = others[f].nonzero().flatten()
                centre, part = self._merge(x[f, where], count - best[f])
                head[f, where], weight[f, where], rank[f, where] = f * x.shape[1] + where[centre], part, 2

    def _merge(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(M,) centre and weight there of every row of ``x`` (M,C) in ``count`` clusters; -1 where there is none."""
        if not count:
            return torch.full_like(x[:, 0], -1, dtype=torch.long), torch.zeros_like(x[:, 0])
        centre = leaders(x, count, min(self.k, count))
        members = torch.bincount(centre, minlength=len(x)) - 1
        part = (1 - self.beta) / members[centre].clamp(min=1)
        own = centre == torch.arange(len(x), device=x.device)
        return centre, torch.where(own, torch.where(members > 0, self.beta, 1.0), part)


def _segments(same: Tensor, longest: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Segments (first frame, first behind the last) that save most tokens, and links (T-1,n) of their static places.

    ``same`` (T-1,n): whether a place is as good as unchanged from a frame to the next. A segment of w frames saves w-1
    tokens for every place that is unchanged throughout.
    """
    links, n = same.shape
    at = torch.arange(1, links + 1, device=same.device)[:, None].expand(links, n)
    run = at - torch.where(same, 0, at).cummax(0).values if links else at  # unchanged links in a row, up to this one
    longest_run = int(run.max()) if links else 0
    most = min(longest_run, longest - 1)
    # Places whose last 1, 2, ... links are unchanged, times the links: on the CPU, where the steps below are cheap.
    ends = torch.zeros(links, longest_run + 1, dtype=torch.long, device=same.device)
    alive = ends.scatter_add(1, run, torch.ones_like(run)).flip(1).cumsum(1).flip(1)[:, 1 : most + 1]
    gain = alive.cpu() * torch.arange(1, most + 1)
    best, length = torch.zeros(links + 2, dtype=torch.long), [1] * (links + 1)  # of the first 0, 1, ... frames
    for i in range(1, links + 1):
        saved = best[max(0, i - most) : i].flip(0) + gain[i - 1, :i]
        best[i + 1] = best[i]
        if len(saved) and int(saved.max()) > int(best[i]):
            top = int(saved.argmax())
            best[i + 1], length[i] = saved[top], top + 2
    spans, stop = [], links + 1
    while stop:
        spans.append((stop - length[stop - 1], stop))
        stop -= length[stop - 1]
    linked = torch.zeros_like(same)
    for start, stop in spans:
        if stop - start > 1:
            linked[start : stop - 1] = run[stop - 2] >= stop - 1 - start
    return spans[::-1], linked
