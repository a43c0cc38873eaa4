"""DPC-KNN clustering as in TCFormer (arXiv 2204.08680): density peaks become tokens, the others join the nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.clustering import peaks
from tokenreduce.algorithms.scoring import ascending, descending, distances, excluded, finite
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.reducer import Reducer, check_size_bias
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["DPCKNN"]


@dataclass(frozen=True)
class DPCKNN(Reducer, name="dpcknn", needs=(), position="before", paper="2204.08680", title="DPC-KNN token clustering"):
    """DPC-KNN: clusters the input of a few blocks and merges every cluster into its centre's place.

    With D the Euclidean distance over sqrt(channels), a token's density is exp(-mean D^2 to its k nearest tokens,
    itself included), its isolation the distance to the nearest denser token (for the densest: the largest distance of
    the sample). Centres are the tokens with the highest product; every token joins the nearest centre.

    Args:
        sample_ratio: share of the patch tokens that become centres in each acting layer, ceil(ratio * T) of the T
            present, computed with a tolerance of 1e-6.
        k: neighbours in the density; at most the number of tokens are used.
        layers: 0-based layers whose input is clustered; a quarter, half and three quarters of the depth by default.
        keep: instead of ``sample_ratio``: patch tokens left after the last acting layer, by equal ratios.
        weighted: whether the mean of a cluster counts a token by its size (what it stands for), so that repeated
            clustering gives means of patches. The published training-free setting has equal weights: False.
        order: clusters by their centre's "position", or by "score", highest first, as the published code has them.
        prop_attn: proportional attention. Off by default, as published; sizes are tracked in any case.
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1]; None leaves it to ``prop_attn``.

    Decisions: equally dense tokens count the lower index as the denser (the published code adds noise); scores are
    compared as logarithms, which is the same order without underflow; means have no epsilon in the denominator;
    tokens that are not there are no neighbour of any, become centres last and weigh nothing. Ties between centres go
    to the higher score in either order.

    Raises ``ValueError`` for settings outside these ranges, layers the model does not have, or ``keep`` given
    together with ``sample_ratio``.
    """

    sample_ratio: float = 0.25
    k: int = 5
    layers: tuple[int, ...] | None = None
    keep: int | float | None = None
    weighted: bool = True
    order: str = "position"
    prop_attn: bool = False
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_size_bias(self.size_bias)
        check_keep(self.keep)
        check_count(self.k, "k", 1)
        ratio = self.sample_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"sample_ratio is in (0, 1], not {ratio!r}")
        if self.keep is not None and ratio != DPCKNN.sample_ratio:
            raise ValueError("give sample_ratio or keep, not both")
        if self.order not in ("position", "score"):
            raise ValueError(f"order is 'position' or 'score', not {self.order!r}")
        check_layers(self.layers, "layers")

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in stage_layers(self.layers, depth, "layers")

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free, layers = evidence.free(), stage_layers(self.layers, evidence.depth, "layers")
        if evidence.layer not in layers or free < 1:
            return Identity.like(evidence.x)
        if self.keep is not None:
            left = staged(self.keep, evidence, layers)
        else:
            left = max(1, math.ceil(self.sample_ratio * free - 1e-6))
        return Identity.like(evidence.x) if left >= free else self._cluster(left, evidence)

    def _cluster(self, left: int, evidence: EncoderEvidence) -> Plan:
        n, p, out = evidence.n, evidence.prefix, excluded(evidence)
        d = distances(evidence.x[:, p:]) / math.sqrt(evidence.x.shape[-1])
        scores = finite(peaks(d, self.k, out), evidence)
        if out is not None:
            d = d.masked_fill(out[:, None], float("inf"))
            if (fixed := evidence.fixed()) is not None:
                scores = scores.masked_fill(fixed[:, p:], float("inf"))
        batch, t = scores.shape
        k = left + t - evidence.free()  # tokens protected by a mask are clusters of their own
        centres = descending(scores)[:, :k]
        assign = d.gather(2, centres.unsqueeze(1).expand(-1, t, -1)).argmin(-1)
        if self.order == "position":
            centres, place = centres.sort(dim=-1)
            assign = ascending(place).gather(1, assign)
        is_centre = torch.zeros_like(scores).scatter(1, centres, 1.0)
        members = ascending(is_centre)[:, : t - k]
        lead = torch.arange(p, device=d.device).expand(batch, -1)
        real = None if evidence.valid is None else evidence.valid.float()
        keep, dst = torch.cat([lead, p + centres], 1), p + assign.gather(1, members)
        return Merge(n, keep, p + members, dst, weights=real, by_size=self.weighted)
