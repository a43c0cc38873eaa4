"""Token-level correlation-guided compressor (arXiv 2407.14439): views keep as much as they hold information."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, check_layer, kept, saliency
from tokenreduce.algorithms.scoring import finite, gram, unit
from tokenreduce.algorithms.views import apportion, marked, ranks, rooms
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Identity, Plan, Pool, Prune

__all__ = ["TokenCorr"]

SAMPLINGS = ("top-k", "stochastic")
#: Tokens of a view (n,) -> (B,n,n) cosines of their keys.
Alike = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenCorr(Projector, name="tokencorr", needs=("tower", "cls"), paper="2407.14439", title="TokenCorr"):
    """TokenCorr: a view with many tokens alike keeps few; local tokens by early, global ones by late attention.

    In every view alone: a token is redundant when its key (all heads side by side) in a low block has a cosine above
    ``tau`` with those of more than ``n_max`` others. As many tokens as are not redundant stay as local ones, those with
    the highest class-token attention in the low block, and so do all outliers of class-token attention in a deep block
    (above the third quartile plus 1.5 times the distance of the quartiles). Raster order.

    No reference code was released and the paper's values are not known to us: ``tau``, ``n_max``, the blocks, the rule
    for outliers and the weights of the aggregation are placeholders, and this is no reproduction. Further choices of
    ours: a view keeps at least one token; an overview beside crops stays whole where the method finds the number
    itself; with a given ``keep`` the numbers of tokens that are not redundant share it out among all views, the
    overview included (largest remainders), and in a view outliers come first, by deep attention, then the others by
    low attention. Needs a class token.

    Args:
        keep: None lets the densities decide; samples then have different lengths, with empty slots on the left. A
            count or ratio is exact for every image.
        tau: cosine above which two tokens are alike, -1 to 1.
        n_max: how many tokens may be like one that is not redundant.
        low_layer, deep_layer: blocks of the tower; see ``layer`` of :class:`~tokenreduce.algorithms.projector.Salient`.
        aggregate: whether each dropped token joins the kept one of its view with the most similar low key. Features
            are then means with that cosine as weight, beside 1 for the kept token; negative ones do not count.
        sampling: "top-k" takes the highest attention, "stochastic" draws in proportion to it without replacement, as
            the paper does.
        seed: of that draw; the same for all images of as many tokens.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for a tower without class token.
    """

    whole: ClassVar[bool] = True
    space: ClassVar[str] = "vision"
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    tau: float = 0.9
    n_max: int = 0
    low_layer: int | float | None = 1
    deep_layer: int | float | None = None
    aggregate: bool = True
    sampling: str = "top-k"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not -1 <= self.tau <= 1:
            raise ValueError(f"tau is a number in [-1, 1], not {self.tau!r}")
        check_count(self.n_max, "n_max")
        check_count(self.seed, "seed")
        check_layer(self.low_layer, "low_layer")
        check_layer(self.deep_layer, "deep_layer")
        if not isinstance(self.aggregate, bool):
            raise ValueError(f"aggregate is True or False, not {self.aggregate!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is one of {SAMPLINGS}, not {self.sampling!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.low_layer, self.deep_layer)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        low = evidence.tower(self.low_layer)
        metric = unit(low.keys.transpose(1, 2).flatten(2)[:, low.prefix :])
        finite(metric.sum(2), evidence)
        views = [(evidence.view == v).nonzero().flatten() for v in range(len(rooms(evidence)))]
        whole = gram(metric) if any(len(w) == metric.shape[1] for w in views) else None

        def alike(where: Tensor) -> Tensor:  # of several views, one is held at a time
            return gram(metric[:, where]) if whole is None else whole

        stay = self.stay(evidence, alike, views, keep)
        if self.keep is not None:
            pruned = kept(marked(stay, keep), evidence)
        elif bool(stay.all()):
            return Identity.like(evidence.x)
        else:
            pruned = Prune.from_mask(torch.cat([stay.new_ones(len(stay), evidence.prefix), stay], 1))
        return self._merged(evidence, pruned, alike, views, stay) if self.aggregate else pruned

    def stay(self, evidence: VisualEvidence, alike: Alike, views: list[Tensor], keep: int) -> Tensor:
        """(B,N) bool: the tokens that stay, by the tokens of every view and how much they are alike."""
        low = saliency(evidence, self.low_layer, "cls")
        deep = saliency(evidence, self.deep_layer, "cls")
        if self.sampling == "stochastic":  # the largest of logarithm plus Gumbel noise are such a draw
            draw = torch.rand(low.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(low.device)
            low = low.clamp(min=1e-30).log() - (-draw.clamp(1e-7, 1 - 1e-7).log()).log()
        room, view = rooms(evidence), evidence.view
        number = room.expand(len(low), -1).clone()
        outlier, outliers = torch.zeros_like(low, dtype=torch.bool), torch.zeros_like(number)
        for v, where in enumerate(views):
            if not len(where):
                continue
            number[:, v] -= self._redundant(alike(where)).sum(1)
            quartiles = torch.tensor([0.25, 0.75], device=deep.device)
            first, third = torch.quantile(deep[:, where], quartiles, dim=1, keepdim=True)
            outlier[:, where] = deep[:, where] > third + 1.5 * (third - first)
            outliers[:, v] = outlier[:, where].sum(1)
        if self.keep is None:
            number = torch.where(outliers == 0, number.clamp(min=1), number)
            return outlier | (ranks(low, view) < number[:, view]) | ((view == 0) & (evidence.crops is not None))
        budget = apportion(keep, number, room)
        rank = torch.where(
            outlier,
            ranks(deep.masked_fill(~outlier, float("-inf")), view),
            ranks(low.masked_fill(outlier, float("-inf")), view) + outliers[:, view],
        )
        return rank < budget[:, view]

    def _redundant(self, alike: Tensor) -> Tensor:
        """(B,n) bool of one view's tokens by their cosines (B,n,n)."""
        near = alike > self.tau
        near.diagonal(dim1=1, dim2=2).fill_(False)
        return near.sum(2) > self.n_max

    def _merged(self, evidence: VisualEvidence, pruned: Prune, alike: Alike, views: list[Tensor], stay: Tensor) -> Plan:
        """``pruned`` with every dropped token in the mean of the kept one of its view that is most like it."""
        p = evidence.prefix
        target = torch.arange(evidence.n, device=stay.device).expand(len(stay), -1).clone()
        share = torch.ones(target.shape, device=stay.device)
        for where in views:
            if len(where):
                best, partner = alike(where).masked_fill(~stay[:, None, where], float("-inf")).max(2)
                target[:, p + where] = torch.where(stay[:, where], p + where, p + where[partner])
                share[:, p + where] = torch.where(stay[:, where], 1.0, best.clamp(min=0))
        output = pruned.sources().gather(1, target).clamp(min=0)
        weights = share.new_zeros(len(share), pruned.k, evidence.n)
        weights.scatter_(1, output.unsqueeze(1), share.unsqueeze(1))
        return Pool(evidence.n, weights, valid=pruned.valid, keep=pruned.keep)
