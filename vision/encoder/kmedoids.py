"""K-medoids token selection, as compared in "Which Tokens to Use?" (arXiv 2308.04657)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, distances, excluded, finite, received_attention
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["KMedoids"]


@dataclass(frozen=True)
class KMedoids(Reducer, name="kmedoids", needs=("attention",), position="after", paper="2308.04657", title="K-medoids"):
    """K-medoids: clusters the output of a few blocks and keeps one token of every cluster, its medoid.

    It starts from the tokens that receive most attention in the block. Each round, every token joins the nearest
    medoid (Euclidean) and every cluster takes the member with the smallest cost as its new one. The output order is
    that of the initial medoids, most attended first.

    Args:
        layers: 0-based layers whose output is reduced; by default those before the quarters of the depth (2, 5, 8 of
            12), so that blocks 3, 6 and 9 see fewer tokens, as published.
        keep: patch tokens left after the last acting layer, a count or a ratio, by equal ratios.
        cluster_iters: rounds.
        cost: "members": the sum of a member's distances to its cluster, each weighted by the attention that the other
            member receives. "all": its distances to every token of the sample times the attention that it receives
            itself, as the published code computes it (attended tokens are then less likely to stay).

    Decisions: the weights are means instead of sums over heads and queries, which changes no choice; a medoid always
    belongs to its own cluster, even when it has a duplicate; the published equal-weight variant with a random start
    is left out.

    Raises ``ValueError`` for settings outside these ranges or layers the model does not have.
    """

    layers: tuple[int, ...] | None = None
    keep: int | float | None = None
    cluster_iters: int = 3
    cost: str = "members"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layers(self.layers, "layers")
        check_count(self.cluster_iters, "cluster_iters")
        if self.cost not in ("members", "all"):
            raise ValueError(f"cost is 'members' or 'all', not {self.cost!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        return self.keep is not None and layer in self._layers(depth)

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return stage_layers(self.layers, depth, "layers")
        return tuple(sorted({max(0, layer - 1) for layer in stage_layers(None, depth, "layers")}))

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free = evidence.free()
        if self.keep is None or free < 1 or not self.acts_at(evidence.layer, evidence.depth):
            return Identity.like(evidence.x)
        left = staged(self.keep, evidence, self._layers(evidence.depth))
        if left >= free:
            return Identity.like(evidence.x)
        p, out = evidence.prefix, excluded(evidence)
        weight = finite(received_attention(evidence), evidence)[:, p:]
        d = distances(evidence.x[:, p:])
        finite(d.amax(-1), evidence)  # the features, too
        start = weight
        if out is not None:
            start = start.masked_fill(out, float("-inf"))
            if (fixed := evidence.fixed()) is not None:
                start = start.masked_fill(fixed[:, p:], float("inf"))
        medoids = descending(start)[:, : left + weight.shape[1] - free]
        for _ in range(self.cluster_iters):
            medoids = self._update(medoids, d, weight, out)
        lead = torch.arange(p, device=d.device).expand(d.shape[0], -1)
        return Prune(evidence.n, torch.cat([lead, p + medoids], 1))

    def _update(self, medoids: Tensor, d: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """One round: medoids (B,K), distances (B,T,T), attention received (B,T)."""
        t, k = d.shape[1], medoids.shape[1]
        reach = d if out is None else d.masked_fill(out[:, None], float("inf"))
        assign = reach.gather(2, medoids.unsqueeze(1).expand(-1, t, -1)).argmin(-1)
        number = torch.arange(k, device=d.device)
        assign = assign.scatter(1, medoids, number.expand_as(medoids))
        if self.cost == "members":
            same = assign[:, :, None] == assign[:, None]
            cost = (d * weight[:, None] * same).sum(-1)
        else:
            cost = (d if out is None else d.masked_fill(out[:, None], 0.0)).sum(-1) * weight
        if out is not None:  # these never replace a medoid, and stay one if they are (then nothing can replace them)
            cost = cost.masked_fill(out, float("inf"))
        cost = cost[:, None].masked_fill(assign[:, None] != number[:, None], float("inf"))
        best, member = cost.min(-1)
        return torch.where(best < float("inf"), member, medoids)
