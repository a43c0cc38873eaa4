"""FlashVID (arXiv 2602.08024), the part before the language model: attended and diverse tokens, trees over time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.algorithms.clustering import leaders
from tokenreduce.algorithms.greedy import farthest
from tokenreduce.algorithms.projector import Projector, Salient, share
from tokenreduce.algorithms.scoring import descending, inner, unit
from tokenreduce.algorithms.temporal import Temporal, adjacent, by_frame, cut_by_similarity, joined
from tokenreduce.core.budget import check_count, count, proportional
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["FlashVID"]

SELECTIONS = ("attn_div", "attn_div_v2", "attn", "div")
COUNTS = ("tree", "children")
_NUMBERS = 1 << 22  # of similarities in one piece of work, over frames


@dataclass(frozen=True)
class FlashVID(Temporal, Salient, name="flashvid", needs=("tower",), paper="2602.08024", title="FlashVID"):
    """FlashVID's projector part: the most attended and diverse tokens of every frame, and trees of the others.

    Frames are cut into segments where the cosine of their mean tokens is below ``segment_threshold``, and at the least
    similar until there are ``min_segments``. Every frame keeps ceil(alpha * B) of its B tokens unchanged (ADTS: greedy
    max-min choice by cosine distance, calibrated by attention). Each other one becomes a child of the most similar such
    token of the frame before, at any place, where the cosine exceeds ``temporal_threshold`` (TSTM); no more than leave
    B tokens per frame of the segment, the most similar first. The means of these trees become DPC-KNN clusters in the
    frame of their root, B - ceil(alpha * B) per frame of the segment in proportion to a frame's roots; a cluster is the
    plain mean of its trees, at its centre's place. Output in the order of the video.

    The language-model part (before layer 20 of 28 keep 0.3 of the visual tokens by the last query's attention) is
    ``flashvid-llm``. ``keep`` is what enters the language model; the paper's ratio is the average over layers, for
    which it lets 1.25 times as many in. The published whole at 0.25 is
    ``"flashvid:keep=0.25,expansion=1.25+flashvid-llm"``, for Qwen-VL with ``selection=attn_div,min_segments=4`` added.

    Different from the official code: exactly ``keep`` tokens come out. Frames share them evenly, the first ones taking
    the rest, and clusters go to the largest remainders, ties to the first frame (it rounds up in every frame); a frame
    may get none, and its trees are dropped then. A mean over a tree counts all its tokens (``counts``). Selected tokens
    are chosen once, never merged again, also in segments of one frame, and the factor of "attn_div_v2" is at least 0.
    Cuts are counted once, and there is at most one segment per four frames by ``min_segments``: from 32 frames on these
    are 8, as published, and short videos are not all segments of one frame. Ties go to the lower index, in place of
    noise; a zero token is similar to none.

    Args:
        keep: tokens of a video that enter the language model, before ``expansion``.
        alpha: share of a frame's tokens that stay unchanged, in [0, 1].
        selection: what the distances are multiplied by: "attn_div" the candidate's attention; "attn_div_v2" also its
            mean inner product with the frame means of the segment; "div" nothing. "attn" ranks by attention alone.
            "attn_div_v2" is published for LLaVA, "attn_div" for Qwen-VL.
        temporal_threshold: cosine above which tokens of adjacent frames are linked, in [-1, 1].
        segment_threshold: cosine of frame means below which there is a cut, in [-1, 1].
        min_segments: segments at least (8, and 4 for Qwen-VL), but no more than one per four frames.
        expansion: factor on ``keep``, at least 1.
        counts: what the sum over a tree is divided by: "tree" the tokens of the tree; "children" one and the children
            of its root, as the official code does, which makes longer chains larger than their mean.
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`; the paper has the attention received.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25
    alpha: float = 0.7
    selection: str = "attn_div_v2"
    temporal_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    expansion: float = 1.0
    counts: str = "tree"

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = (("alpha", 0, 1), ("temporal_threshold", -1, 1), ("segment_threshold", -1, 1), ("expansion", 1, 1e6))
        for name, low, high in bounds:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} is in [{low}, {high:g}], not {value!r}")
        check_count(self.min_segments, "min_segments", 1)
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection is one of {SELECTIONS}, not {self.selection!r}")
        if self.counts not in COUNTS:
            raise ValueError(f"counts is one of {COUNTS}, not {self.counts!r}")

    def required(self) -> tuple[str, ...]:
        return () if self.selection == "div" else super().required()

    def tower_blocks(self) -> tuple[Look, ...]:
        return () if self.selection == "div" else super().tower_blocks()

    def total(self, present: int) -> int:
        wide = self.keep * self.expansion
        return count(min(1.0, wide) if isinstance(self.keep, float) else int(wide + 0.5), present)

    def at(self, keep: int) -> Projector:
        return replace(self, keep=keep, expansion=1.0)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = by_frame(evidence)
        scores = torch.ones_like(x[..., 0])
        if self.selection != "div":
            scores = self.saliency(evidence).view(scores.shape)
        return joined(evidence, [self._sample(x[b], scores[b], keep) for b in range(len(x))])

    def _sample(self, x: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, None]:
        """Heads and weights (see :func:`joined`) of a video ``x`` (T,n,C); scores (T,n)."""
        t, n = x.shape[:2]
        means, u = x.mean(1), unit(x)
        alike = adjacent(means[None, :, None])[0, :, 0]
        spans = cut_by_similarity(alike, self.segment_threshold, min(self.min_segments, t // 4))
        each = share(keep, [n] * t)
        stay = self._selected(u, self._calibrated(x, means, scores, spans), [self._unchanged(m) for m in each])
        parent = _parents(u, stay, spans, each, self.temporal_threshold)
        own = torch.arange(t * n, device=x.device).view(t, n)
        root = own.clone()
        for f in range(1, t):
            root[f] = torch.where(parent[f] < 0, own[f], root[f - 1][parent[f].clamp(min=0)])
        if self.counts == "tree":
            size = torch.bincount(root.flatten(), minlength=t * n)
        else:
            child = parent >= 0
            size = 1 + torch.bincount(((own // n - 1) * n + parent)[child], minlength=t * n)
        mean = torch.zeros_like(x).view(t * n, -1).index_add_(0, root.flatten(), x.flatten(0, 1)) / size[:, None]
        head, part = self._clustered(mean.view_as(x), stay, (root == own) & ~stay, spans, each)
        return head[root.flatten()], (part / size)[root.flatten()], None

    def _unchanged(self, each: int) -> int:
        return math.ceil(each * self.alpha - 1e-9)

    def _calibrated(self, x: Tensor, means: Tensor, scores: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        """(T,n) factors on the distances; the mean over a segment's frames is the product with their mean."""
        if self.selection != "attn_div_v2":
            return scores
        event = torch.cat([(x[a:b] * means[a:b].mean(0)).sum(-1) for a, b in spans])
        return scores * event.clamp(min=0)

    def _selected(self, u: Tensor, factor: Tensor, counts: list[int]) -> Tensor:
        """(T,n) bool: the ``counts`` tokens of every frame that stay unchanged, from ``u`` (T,n,C) of unit length."""
        t, n = u.shape[:2]
        if self.selection == "attn":
            order = descending(factor)[:, : max(counts)]
        else:
            order, step = u.new_empty(t, max(counts), dtype=torch.long), max(1, _NUMBERS // (n * n))
            for a in range(0, t, step):
                d = (1 - inner(u[a : a + step], u[a : a + step])).clamp(min=0) * factor[a : a + step, None]
                order[a : a + step] = farthest(d, max(counts))
        wanted = torch.tensor(counts, device=u.device)[:, None] > torch.arange(max(counts), device=u.device)
        return torch.zeros(t, n, dtype=torch.bool, device=u.device).scatter(1, order, wanted)

    def _clustered(
        self, x: Tensor, stay: Tensor, roots: Tensor, spans: list[tuple[int, int]], each: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(T*n,) head and weight there of every token that stays or is the root of a tree with mean ``x`` (T,n,C)."""
        t, n = stay.shape
        own = torch.arange(t * n, device=x.device).view(t, n)
        head, part = torch.where(stay, own, -1), torch.ones_like(x[..., 0])
        there = roots.sum(1).tolist()
        for a, b in spans:
            wanted = proportional(sum(m - self._unchanged(m) for m in each[a:b]), there[a:b])
            for f, m in zip(range(a, b), wanted, strict=True):
                if m:
                    where = roots[f].nonzero().flatten()
                    centre = leaders(x[f, where], m, min(7, m))
                    head[f, where] = own[f, where[centre]]
                    part[f, where] = 1 / torch.bincount(centre, minlength=len(where))[centre].float()
        return head.flatten(), part.flatten()


def _parents(u: Tensor, stay: Tensor, spans: list[tuple[int, int]], each: list[int], threshold: float) -> Tensor:
    """(T,n) the place in the frame before that a token is linked to, or -1, from ``u`` (T,n,C) of unit length."""
    t, n = stay.shape
    best, parent = torch.full_like(u[..., 0], float("-inf")), torch.full_like(stay, -1, dtype=torch.long)
    step = max(1, _NUMBERS // (n * n))
    for a in range(1, t, step):
        b = min(t, a + step)
        alike = inner(u[a:b], u[a - 1 : b - 1]).masked_fill(stay[a - 1 : b - 1, None], float("-inf"))
        best[a:b], parent[a:b] = alike.max(-1)
    best[torch.tensor([a for a, _ in spans], device=u.device)] = float("-inf")
    best = best.masked_fill(stay | (best <= threshold), float("-inf"))
    for a, b in spans:  # every link is one output less
        order = best[a:b].flatten().argsort(descending=True, stable=True)[n * (b - a) - sum(each[a:b]) :]
        best[a:b] = best[a:b].flatten().index_fill(0, order, float("-inf")).view(b - a, n)
    return torch.where(best > threshold, parent, -1)
