"""Temporal duplicate merge and a balanced budget per frame: the training-free steps of B-VLLM (arXiv 2412.09919)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.matching import halvings
from tokenreduce.algorithms.projector import share
from tokenreduce.algorithms.scoring import finite, inner, unit
from tokenreduce.algorithms.temporal import Temporal, by_frame, frames_of
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Merge, Plan

__all__ = ["FrameMerge"]

#: Frames that are compared, or merged inside, at a time: memory stays linear in the number of frames.
_CHUNK = 64


@dataclass(frozen=True)
class FrameMerge(Temporal, name="frame-merge", paper="2412.09919", title="Duplicate frames merged, balanced budget"):
    """Temporal duplicate merge + balanced per-frame budget: the steps of B-VLLM that need no training.

    This is not B-VLLM, whose frames are chosen, and whose tokens are made, by trained query transformers; nothing that
    was published about B-VLLM's accuracy holds for it.

    1. Frames are compared by the cosine of the means of their tokens. A frame whose most similar earlier frame has
       (cos + 1) / 2 > ``threshold`` joins it (ties to the earlier frame). Chains are followed to their first frame:
       tokens at the same place become the plain mean over all frames of a group, at the place of its first frame.
    2. The budget is shared out evenly among the D frames that are left, the first ones taking the rest: the fewer
       distinct frames, the more tokens each.
    3. In every frame bipartite matching (ToMe's step, on the embeddings themselves) halves the tokens until one last
       step reaches the frame's share. Targets are plain means of themselves and their sources in each step.

    Outputs stand frame by frame, inside a frame in the published order: unmerged even places by falling similarity,
    then the odd places; where no step was needed, in raster order.

    Decisions: the published 0.75 is a threshold on rows of the trained selector; frame means are alike far beyond that,
    and ``threshold`` is 0.975 (cosine 0.95) by default, a value of this library. D cannot exceed ``keep``, nor be so
    small that D frames have fewer than ``keep`` tokens: where the threshold asks for that, more or fewer frames are
    merged, most similar first, so that exactly ``keep`` tokens come out. Similarities of frames are rounded to 6
    digits, which makes equal frames tie. Chains are whole; the published code cuts them after one step, losing frames.

    Args:
        keep: 576 tokens of a video by default, as published.
        threshold: on (cos + 1) / 2, in [0, 1]; 1 merges no frames.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these, and for tokens that are protected by a mask or samples of unequal
    length.
    """

    keep: int | float = 576
    threshold: float = 0.975

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float)
        if wrong or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a number in [0, 1], not {self.threshold!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        p, x = evidence.prefix, by_frame(evidence)
        parent, alike = nearest_earlier(finite(x.mean(2), evidence))
        front = torch.arange(p, device=x.device)
        samples = []
        for b in range(len(x)):
            first = self.groups(parent[b], alike[b], keep, frames_of(evidence)[1])
            assign, weight, place = balanced(x[b], first, keep, evidence.layer)
            ones = weight.new_ones(p)
            samples.append((torch.cat([front, assign + p]), torch.cat([ones, weight]), torch.cat([front, place + p])))
        assign, weights, places = (torch.stack(part) for part in zip(*samples, strict=True))
        return Merge.from_assignment(assign, keep + p, places, weights=weights, by_size=False)

    def groups(self, parent: Tensor, alike: Tensor, keep: int, n: int) -> list[int]:
        """The first frame of every frame's group, where frame t >= 1 may join ``parent[t]`` at similarity ``alike[t]``.

        So many frames of ``n`` tokens stay apart that ``keep`` tokens can come out, at least one of each.
        """
        t = len(parent)
        links = int((alike[1:] > self.threshold).sum())
        links = min(max(links, t - keep), t - -(-keep // n))
        joins = set((alike[1:].argsort(descending=True, stable=True)[:links] + 1).tolist())
        first = list(range(t))
        for i, earlier in enumerate(parent.tolist()):
            if i in joins:
                first[i] = first[earlier]  # earlier frames already know where their chain begins
        return first


def nearest_earlier(means: Tensor) -> tuple[Tensor, Tensor]:
    """For every frame the most similar earlier one (B,T), ties to the earlier, and (cos + 1) / 2 to it (B,T), from
    ``means`` (B,T,C); 0 and -1 for the first frame, which has none."""
    m, parts = unit(means), []
    for start in range(0, m.shape[1], _CHUNK):
        mine = m[:, start : start + _CHUNK]
        cos = inner(mine, m[:, : start + _CHUNK]).clamp(-1, 1)
        alike = ((cos + 1) / 2).round(decimals=6)
        later = torch.ones_like(alike[0], dtype=torch.bool).triu(start)
        alike = alike.masked_fill(later, -1.0)
        best = alike.argmax(-1, keepdim=True)
        parts.append((best.squeeze(-1), alike.gather(-1, best).squeeze(-1)))
    return torch.cat([i for i, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def balanced(x: Tensor, first: list[int], keep: int, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 2 and 3 on one video ``x`` (T,n,C): each token's output (T*n,), its weight there (weights of an output sum
    to 1), and the tokens that outputs take their places from (keep,)."""
    (t, n, _), device = x.shape, x.device
    heads = sorted(set(first))
    number = {head: g for g, head in enumerate(heads)}
    group = torch.tensor([number[f] for f in first], device=device)
    members = torch.bincount(group, minlength=len(heads))
    merged = x
    if len(heads) < t:
        merged = x.new_zeros(len(heads), *x.shape[1:]).index_add_(0, group, x) / members[:, None, None]
    quota = torch.tensor(share(keep, [n] * len(heads)), device=device)
    slot = torch.empty(len(heads), n, dtype=torch.long, device=device)
    weight = torch.empty(len(heads), n, device=device)
    place = torch.empty(keep, dtype=torch.long, device=device)
    start = quota.cumsum(0) - quota
    for q in quota.unique().tolist():
        for some in (quota == q).nonzero().flatten().split(_CHUNK):
            inside, share_of, host = _halved(merged[some], q, layer)
            slot[some], weight[some] = inside + start[some, None], share_of
            at = start[some, None] + torch.arange(q, device=device)
            place[at] = torch.tensor(heads, device=device)[some, None] * n + host
    return slot[group].flatten(), (weight / members[:, None])[group].flatten(), place


def _halved(x: Tensor, keep: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite merging of frames ``x`` (G,n,C) to ``keep`` tokens each: output and weight of every token (G,n), and
    the tokens that outputs take their places from (G,keep)."""
    host = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    slot, weight = host, torch.ones(x.shape[:2], device=x.device)
    for step in halvings(x, keep, layer):
        to = step.sources()
        count = torch.zeros(step.keep.shape, device=x.device).scatter_add(1, to, torch.ones_like(to, dtype=x.dtype))
        slot, host = to.gather(1, slot), host.gather(1, step.keep)
        weight = weight / count.gather(1, slot)
    return slot, weight, host
