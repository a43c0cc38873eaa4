"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): outliers of class attention, each merged with similar tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, saliency
from tokenreduce.algorithms.scoring import descending, finite, highest, inner, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Pool, take

__all__ = ["PruMerge", "PruMergePlus"]


@dataclass(frozen=True)
class PruMerge(Salient, name="prumerge", needs=("tower",), paper="2403.15388", title="PruMerge"):
    """PruMerge: tokens whose class-token attention is an outlier stay, each adds up its neighbours, and one token more
    adds up all others.

    Attention a and keys are those of the last block, all heads read as one of full width (softmax(q·k / sqrt(C))); the
    features are those that enter the projector, from an earlier block. A kept token i becomes x_i plus the sum of
    a_j x_j over the tokens j with the most similar keys (cosine), kept ones included; the extra token is the sum of
    a_j x_j over all that are not kept. Nothing is divided by the sum of the weights. Order: by falling attention, the
    extra token last; its place is that of the most attended token that was not kept.

    Different from the official code: every image counts its own outliers (there the batch is pooled), at least one
    token is kept beside the extra one, the count of outliers is exact (there a ratio, truncated again), fewer tokens
    than ``neighbours`` are no error, and ties go to the lower index. A tower without class token ranks by the mean
    attention received, as in published ports; these replace the adaptive count by a budget.

    Args:
        keep: None counts, as the paper does, the attention values above the third quartile plus ``iqr_factor`` times
            the distance of the quartiles, for every view: samples then have different lengths, with empty slots on the
            left. A count or ratio is the exact number of outputs, the extra token included (but for ``keep=1``).
        neighbours: tokens merged into each kept one.
        iqr_factor: how far above the quartile an outlier is.
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    space: ClassVar[str] = "vision"
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    neighbours: int = 32
    iqr_factor: float = 1.5
    layer: int | float | None = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.neighbours, "neighbours")
        wrong = isinstance(self.iqr_factor, bool) or not isinstance(self.iqr_factor, int | float)
        if wrong or not 0 <= self.iqr_factor < float("inf"):
            raise ValueError(f"iqr_factor is a finite number >= 0, not {self.iqr_factor!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        a, p = saliency(evidence, self.layer, self.score, joined=True), evidence.prefix
        ranked = descending(a)
        if self.keep is None:
            order, number = self.spread(ranked, self.outliers(a))
        else:
            number = torch.full((len(a), 1), max(keep - 1, 1), device=a.device)
            order = self.fill(ranked, max(keep - 1, 1))
        # Outputs are the first tokens of the order; the last one hosts the extra token where one is left for it.
        order = torch.cat([torch.arange(p, device=a.device).expand(len(a), -1), order + p], 1)
        number, total = number + p, (number + 1).clamp(max=keep) + p
        slots = int(total.max()) if self.keep is None else keep + p
        place = torch.arange(slots, device=a.device) - (slots - total)
        index = order.gather(1, place % evidence.n)
        weights = self._weights(evidence, a, order, number, index, place)
        valid = None if self.keep is not None or bool((total == slots).all()) else place >= 0
        return Pool(evidence.n, weights, normalised=False, valid=valid, keep=index)

    def outliers(self, a: Tensor) -> Tensor:
        """(B,1) how many values of every row of ``a`` (B,N) are outliers, at least 1."""
        low, high = torch.quantile(a, torch.tensor([0.25, 0.75], device=a.device), dim=1, keepdim=True)
        return (a > high + self.iqr_factor * (high - low)).sum(1, keepdim=True).clamp(min=1)

    def spread(self, ranked: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """(B,N) tokens, those to keep first, and (B,1) how many these are, where ``number`` (B,1) are outliers."""
        return ranked, number

    def fill(self, ranked: Tensor, number: int) -> Tensor:
        """(B,N) tokens, the ``number`` to keep first."""
        return ranked

    def _weights(
        self, evidence: VisualEvidence, a: Tensor, order: Tensor, number: Tensor, index: Tensor, place: Tensor
    ) -> Tensor:
        """(B,K,N) float32 rows of outputs at ``index`` (B,K), ``place`` (B,K) of ``order`` (B,N); zero below place 0.

        The first ``number`` (B,1) places are kept tokens, protected ones first, the next one is the extra token.
        """
        seen, p = evidence.tower(self.layer), evidence.prefix
        metric = unit(seen.keys.transpose(1, 2).flatten(2))
        alike = inner(take(metric, index), metric).scatter(2, index.unsqueeze(-1), float("-inf"))
        alike[..., :p] = float("-inf")
        near = highest(finite(alike, evidence), min(self.neighbours, a.shape[1] - 1))
        a = torch.cat([a.new_zeros(len(a), p), a], 1)
        own = (near & (place >= p).unsqueeze(-1)) * a.unsqueeze(1)
        own = own.scatter_(2, index.unsqueeze(-1), 1.0)
        rank = order.argsort(dim=1)
        extra = torch.where(rank < number, 0.0, a).unsqueeze(1)
        out = torch.where((place < number).unsqueeze(-1), own, extra)
        return out.masked_fill((place < 0).unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class PruMergePlus(PruMerge, name="prumerge-plus", needs=("tower",), paper="2403.15388", title="PruMerge+"):
    """PruMerge+: PruMerge that also keeps evenly spaced tokens, a number that goes with that of the outliers.

    With K outliers among N tokens it adds every p-th from the first on but the last token, p = (N // K) // 3 (at least
    1), where they are not outliers themselves. Order: outliers by falling attention, spaced tokens as in the image,
    the extra token. With an explicit ``keep`` half of the kept tokens (rounded up) are those with the most attention,
    as in the official fixed mode, and the rest is evenly spaced among all others, so that no token is kept twice.

    Args:
        keep, neighbours, iqr_factor: see :class:`PruMerge`.
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    def spread(self, ranked: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        n = ranked.shape[1]
        at, rank = torch.arange(n, device=ranked.device), ranked.argsort(dim=1)
        spaced = (at % (n // number // 3).clamp(min=1) == 0) & (at < n - 1) & (rank >= number)
        key = torch.where(rank < number, rank, torch.where(spaced, n + at, 2 * n + rank))
        return key.argsort(dim=1), number + spaced.sum(1, keepdim=True)

    def fill(self, ranked: Tensor, number: int) -> Tensor:
        best, spaced = ranked[:, : (number + 1) // 2], number // 2
        if not spaced:
            return ranked
        rest = ranked[:, best.shape[1] :]
        order = rest.argsort(dim=1)
        steps = torch.arange(spaced, device=ranked.device)
        chosen = order[:, (2 * steps + 1) * rest.shape[1] // (2 * spaced)]
        left = torch.ones_like(rest, dtype=torch.bool).scatter(1, chosen, False)
        others = rest[left].view(len(rest), -1)
        return torch.cat([best, rest.gather(1, chosen), others], 1)
