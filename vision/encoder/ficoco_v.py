"""FiCoCo-V (arXiv 2411.17686): redundant patches are split over those that they attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, descending, finite, importance
from tokenreduce.core.budget import check_count, check_either, linear
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Pool
from tokenreduce.core.reducer import Reducer

__all__ = ["FiCoCoV"]


@dataclass(frozen=True)
class FiCoCoV(
    Reducer, name="ficoco-v", stage="encoder", needs=("attention",), paper="2411.17686", title="FiCoCo-V"
):  # fmt: skip
    """FiCoCo inside a vision encoder: filter, correlate, compress, in every layer of its second half.

    A is the layer's attention, mean over heads. Filter: a patch scores beta * c - (1 - beta) * m, where c is what the
    class token pays to it and m the mean that it pays to patches, both of unit length over the image. In every 2 x 2
    window of the grid the lowest score is lowered further (halved where positive, doubled where negative), so that each
    neighbourhood gives up its most redundant patch first. The ``r`` lowest go. Correlate: a patch that goes has as its
    targets the patches with the largest softmax(A) in its row, as many as, at most over the patches that go, lie above
    the ``quantile`` of their row of A. Compress: a target becomes the mean of itself (weight 1) and its shares of what
    goes to it, weighted by sizes; shares of a patch sum to 1, sizes are fractional.

    The released code is no function of one image: its windows are a buffer that lives across images, and places are
    shifted where they must be mapped. This is the paper's idea instead: windows of the patches that the image has left,
    targets among patches other than the token itself, kept patches in the image's order. As in its language part, what
    goes to a patch that goes itself is lost. Sizes are tracked, attention does not count them. A tower without class
    token takes the mean attention received for c, which is ours; where patches fill no grid there are no windows.

    Args:
        r: patches that every acting layer removes; 42, at most all but one.
        keep: instead of ``r``, patches left after the last layer, a count or a ratio, by equal steps.
        start: first layer that acts; None is the middle (12 of 24).
        beta: weight of the class token's attention, in [0, 1].
        quantile: of a row, from which targets count, in [0, 1].
        windows: whether windows lower their lowest score.

    Ties go to the lower index, also among patches that go.

    Raises ``ValueError`` for other values, both ``r`` and ``keep``, and a ``start`` that the model does not have.
    """

    r: int | None = None
    keep: int | float | None = None
    start: int | None = None
    beta: float = 0.35
    quantile: float = 0.998
    windows: bool = True

    def __post_init__(self) -> None:
        if self.r is not None:
            check_count(self.r, "r", 1)
        check_either(self.keep, self.r is not None)
        if self.start is not None:
            check_count(self.start, "start")
        for name in ("beta", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a number in [0, 1], not {getattr(self, name)!r}")

    def _start(self, depth: int) -> int:
        start = depth // 2 if self.start is None else self.start
        if start >= depth:
            raise ValueError(f"start={start}: the model has layers 0 to {depth - 1}")
        return start

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer >= self._start(depth)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        n, free, start = evidence.n, evidence.free(), self._start(evidence.depth)
        if evidence.layer < start:
            return Identity.like(evidence.x)
        if self.keep is None:
            r = min(42 if self.r is None else self.r, free - 1)
        else:
            entry = evidence.entry - (n - free)
            r = free - linear(self.keep, entry, evidence.layer - start, evidence.depth - start)
        if r <= 0:
            return Identity.like(evidence.x)
        fixed = evidence.fixed()
        if fixed is None:
            fixed = torch.zeros(evidence.batch, n, dtype=torch.bool, device=evidence.x.device)
        out = fixed if evidence.valid is None else fixed | ~evidence.valid
        rows = evidence.attention("all").mean(1)
        order = ascending(self._redundancy(evidence, rows, out))
        gone, stays = order[:, :r], order[:, r:].sort(1).values
        # Protected tokens lead whatever their index, those that are not there come last.
        rank = torch.where(fixed, 0, torch.where(out, 2, 1)).gather(1, stays)
        stays = stays.gather(1, ascending(rank))
        weights = torch.zeros(evidence.batch, n - r, n, device=rows.device)
        weights = weights.scatter(2, stays.unsqueeze(-1), 1.0)
        shares = self._shares(rows, gone, out).gather(2, stays.unsqueeze(1).expand(-1, r, -1))
        weights = weights.scatter(2, gone.unsqueeze(1).expand(-1, n - r, -1), shares.transpose(1, 2))
        valid = None if evidence.valid is None else evidence.valid.gather(1, stays)
        return Pool(n, weights, by_size=True, valid=valid, keep=stays)

    def _redundancy(self, evidence: EncoderEvidence, rows: Tensor, out: Tensor) -> Tensor:
        """(B,N) the lowest go first; infinity for what takes no part."""
        seen = importance(evidence).masked_fill(out, 0.0)
        number = (~out).sum(1, keepdim=True)
        paid = (rows * ~out.unsqueeze(1)).sum(2).masked_fill(out, 0.0) / number
        seen, paid = (t / t.norm(dim=1, keepdim=True).clamp(min=1e-12) for t in (seen, paid))
        score = finite(self.beta * seen - (1 - self.beta) * paid, evidence)
        if self.windows and evidence.grid is not None and evidence.prefix + _area(evidence.grid) == evidence.entry:
            score = torch.where(_lowest(evidence, score.masked_fill(out, float("inf"))), _lower(score), score)
        return score.masked_fill(out, float("inf"))

    def _shares(self, rows: Tensor, gone: Tensor, out: Tensor) -> Tensor:
        """(B,r,N) what each of the patches ``gone`` (B,r) gives to every patch."""
        n = rows.shape[2]
        mine = rows.gather(1, gone.unsqueeze(-1).expand(-1, -1, n))
        none = out.unsqueeze(1) | (gone.unsqueeze(-1) == torch.arange(n, device=gone.device))
        # Quantiles are over the patches that take part: others are put in front, and the place moves behind them.
        ordered = mine.masked_fill(none, -1.0).sort(2).values
        first = none.sum(2, keepdim=True)
        at = first + self.quantile * (n - 1 - first).clamp(min=0)
        low = at.floor().long().clamp(max=n - 1)
        below, above = ordered.gather(2, low), ordered.gather(2, (low + 1).clamp(max=n - 1))
        bound = below + (at - low) * (above - below)
        many = ((mine > bound) & ~none).sum(2).amax(1).clamp(min=1)[:, None, None]
        shares = mine.softmax(2).masked_fill(none, 0.0)
        rank = descending(shares.masked_fill(none, -1.0)).argsort(dim=2)
        shares = shares * (rank < many)
        return shares / shares.sum(2, keepdim=True).clamp(min=1e-12)


def _area(grid: tuple[int, ...]) -> int:
    area = 1
    for side in grid:
        area *= side
    return area


def _lower(score: Tensor) -> Tensor:
    return torch.where(score > 0, score / 2, score * 2)


def _lowest(evidence: EncoderEvidence, score: Tensor) -> Tensor:
    """(B,N) bool: the token with the lowest ``score`` of every 2 x 2 window of the grid, ties to the lower index."""
    assert evidence.grid is not None
    n, device = evidence.n, score.device
    columns = evidence.grid[-1]
    place = torch.arange(n, device=device).expand(evidence.batch, -1) if evidence.origin is None else evidence.origin
    place = (place - evidence.prefix).clamp(min=0)
    row, column = place // columns, place % columns
    wide, tall = (columns + 1) // 2, (evidence.grid[-2] + 1) // 2
    # A window does not reach over the border of a frame.
    frame, inside = row // evidence.grid[-2], row % evidence.grid[-2]
    window = (frame * tall + inside // 2) * wide + column // 2
    many = _area(evidence.grid[:-2]) * tall * wide
    least = torch.full((evidence.batch, many), float("inf"), device=device).scatter_reduce(1, window, score, "amin")
    is_least = (score == least.gather(1, window)) & (score < float("inf"))
    at = torch.arange(n, device=device).expand(evidence.batch, -1)
    first = torch.full((evidence.batch, many), n, device=device)
    first = first.scatter_reduce(1, window, torch.where(is_least, at, n), "amin")
    return is_least & (first.gather(1, window) == at)
