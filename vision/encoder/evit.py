"""EViT (arXiv 2202.07800): keep the patches that the class token attends to, optionally fuse the others into one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.scoring import importance, select
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["EViT"]


@dataclass(frozen=True)
class EViT(Reducer, name="evit", needs=("attention",), paper="2202.07800", title="EViT"):
    """EViT: a few layers keep the patches of highest class attention, averaged over heads.

    The output order is the published one: prefix, kept patches by descending importance, fused token. In models
    without a class token the importance is the mean attention received.

    Args:
        base_keep_rate: share kept in each acting layer, ceil(rate * T) of the T patch tokens present (an earlier
            fused token is one of them), computed with a tolerance of 1e-6.
        drop_loc: 0-based layers that act; a quarter, half and three quarters of the depth by default (3, 6, 9 of 12).
        fuse_token: whether the patches that are not kept become one token, the sum of their features weighted by
            importance, which stands at the place of the most important of them.
        tokens: patches kept in each acting layer, instead of ``base_keep_rate``; a fused token comes on top.
        keep: instead of both: patch tokens left after the last acting layer, a count or a ratio, by equal ratios.
            It includes the fused token; a layer with room for one token keeps the best patch and fuses nothing.
        normalised: divide the fused token by the sum of its weights. Off by default (the published sum); useful
            without training, since the sum is much smaller than any token that the network has seen.

    A layer that would keep every patch does nothing, and neither does one with fewer than ``tokens`` patches. All
    prefix tokens are protected, not only the class token. No proportional attention.

    Raises ``ValueError`` for settings outside these ranges, layers the model does not have, or ``keep`` given
    together with ``base_keep_rate`` or ``tokens``.
    """

    base_keep_rate: float = 0.7
    drop_loc: tuple[int, ...] | None = None
    fuse_token: bool = False
    tokens: int | None = None
    keep: int | float | None = None
    normalised: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        rate = self.base_keep_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f"base_keep_rate is in (0, 1], not {rate!r}")
        if self.tokens is not None:
            check_count(self.tokens, "tokens", 1)
        if self.keep is not None and (self.tokens is not None or rate != EViT.base_keep_rate):
            raise ValueError("give keep, tokens or base_keep_rate, not several")
        check_layers(self.drop_loc, "drop_loc")

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in stage_layers(self.drop_loc, depth, "drop_loc")

    def plan(self, evidence: EncoderEvidence) -> Plan:
        k, fuse = self._amount(evidence)
        free = evidence.free()
        if k >= free:
            return Identity.like(evidence.x)
        scores = importance(evidence)
        order = select(scores, free, evidence, by_score=True)
        lead = evidence.n - free
        keep, rest = order[:, : lead + k], order[:, lead + k :]
        if not fuse:
            return Prune(evidence.n, keep)
        dst = torch.full_like(rest[:, 1:], lead + k)
        weights = torch.ones_like(scores).scatter(1, rest, scores.gather(1, rest))
        mode = "mean" if self.normalised else "sum"
        keep = torch.cat([keep, rest[:, :1]], 1)
        return Merge(evidence.n, keep, rest[:, 1:], dst, weights=weights, mode=mode, by_size=False)

    def _amount(self, evidence: EncoderEvidence) -> tuple[int, bool]:
        """Patches to keep, and whether to fuse the others."""
        layers = stage_layers(self.drop_loc, evidence.depth, "drop_loc")
        free = evidence.free()
        if evidence.layer not in layers or free < 1:
            return free, False
        if self.keep is not None:
            left = staged(self.keep, evidence, layers)
            fuse = self.fuse_token and 1 < left < free
            return left - fuse, fuse
        if self.tokens is not None:
            return self.tokens, self.fuse_token
        return math.ceil(self.base_keep_rate * free - 1e-6), self.fuse_token
