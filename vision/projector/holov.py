"""HoloV (arXiv 2510.02912): the budget is shared out over runs of the image, and each keeps its most salient tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, kept
from tokenreduce.algorithms.scoring import descending, finite, inner, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["ORDERS", "RESCALES", "HoloV"]

ORDERS = ("ascending", "attention")
RESCALES = ("run", "image")


@dataclass(frozen=True)
class HoloV(Salient, name="holov", needs=("tower",), paper="2510.02912", title="HoloV"):
    """HoloV: holistic context retention. One selection over all views of an image.

    The token sequence is cut into runs (consecutive tokens, not squares). A run's score is the mean of 1000 * attention
    + beta * variance * scale over its tokens, where the variance is that of a token's cosines to the others of its run
    (with a 0 for itself, which the divisor n - 1 does not count), and the scale brings variances to the mean attention.
    Runs get budgets in proportion to their scores, rounded down, and what remains goes one each to the highest; a run
    keeps the tokens with the highest attention. As published, with the scale of each run on its own, the variance
    cancels but for a constant of 1e-6: budgets follow attention mass. ``rescale="image"`` takes one scale for all.

    Different from the official code: a budget that exceeds its run goes to the other runs, by score (zero vectors are
    appended there), so that exactly ``keep`` stay; tokens stay in order (``order="attention"`` is the official one:
    run by run, by descending attention where a run loses tokens); and attention of one-token runs has its factor 1000
    too, without which they get next to nothing. Attention comes from the class token, averaged over heads; without one
    it is the mean received, as published for Qwen2.5-VL.

    Args:
        keep: 64 of 576 in the paper.
        runs: number of runs, 16 in the code for LLaVA; runs without a token do not count. None is the rule for
            Qwen2.5-VL, int(1024 / 576 * tokens / keep) and at least 1, which is 16 for 64 of 576.
        beta: weight of the variance, >= 0.
        order: "ascending" or "attention".
        rescale: "run" or "image".
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 64
    runs: int | None = 16
    beta: float = 0.09
    order: str = "ascending"
    rescale: str = "run"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs is not None:
            check_count(self.runs, "runs", 1)
        b = self.beta
        if isinstance(b, bool) or not isinstance(b, int | float) or not 0 <= b < math.inf:
            raise ValueError(f"beta is a number >= 0, not {b!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {ORDERS}, not {self.order!r}")
        if self.rescale not in RESCALES:
            raise ValueError(f"rescale is one of {RESCALES}, not {self.rescale!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        a = self.saliency(evidence)
        x = evidence.projected.detach()
        n = a.shape[1]
        runs = min(n, max(1, int(1024 / 576 * n / keep)) if self.runs is None else self.runs)
        length, longer = divmod(n, runs)
        sizes = length + (torch.arange(runs, device=a.device) < longer).long()
        budget = _share(finite(self._scores(a, x, sizes, longer), evidence), sizes, keep)
        run = torch.arange(runs, device=a.device).repeat_interleave(sizes, output_size=n)
        start = (sizes.cumsum(0) - sizes)[run]
        by_attention = descending(a)
        listed = by_attention.gather(1, run[by_attention].argsort(dim=1, stable=True))
        # `listed`: run after run, each by descending attention; one that loses nothing stays as it is.
        full = (budget == sizes)[:, run]
        stays = torch.arange(n, device=a.device) - start < budget[:, run]
        listed = torch.where(full, torch.arange(n, device=a.device), listed)
        index = listed.gather(1, descending(stays.long())[:, :keep])
        return kept(index, evidence, raster=self.order == "ascending")

    def _scores(self, a: Tensor, x: Tensor, sizes: Tensor, longer: int) -> Tensor:
        """(B,P) scores of the runs: the ``longer`` first ones have one token more than the rest."""
        cut = longer * (a.shape[1] // len(sizes) + 1)
        groups = [(a[:, :cut], x[:, :cut], longer), (a[:, cut:], x[:, cut:], len(sizes) - longer)]
        mass, variance = [], []
        for part, tokens, count in groups:
            if count:
                mass.append(1000 * part.reshape(len(a), count, -1).mean(2))
                variance.append(_variance(tokens.reshape(len(a), count, -1, x.shape[2])))
        mean, spread = torch.cat(mass, 1), torch.cat(variance, 1)
        if self.rescale == "run":
            scale = mean.abs() / (spread + 1e-6)
        else:
            n = a.shape[1]
            scale = (1000 * a).abs().mean(1, keepdim=True) / ((spread * sizes).sum(1, keepdim=True) / n + 1e-6)
        return mean + self.beta * spread * scale


def _variance(x: Tensor) -> Tensor:
    """(B,P) mean over the tokens of a run (B,P,n,D) of the variance of their cosines to each other."""
    b, p, n, _ = x.shape
    if n == 1:
        return x.new_zeros(b, p, dtype=torch.float32)
    u = unit(x).flatten(0, 1)
    s = inner(u, u).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0.0)
    mean = s.sum(2, keepdim=True) / (n - 1)
    return ((s - mean).square().sum(2) / (n - 1)).mean(1).view(b, p)


def _share(scores: Tensor, room: Tensor, total: int) -> Tensor:
    """(B,P) int: ``total`` tokens (fewer than there is room for) shared out among runs in proportion to ``scores``
    (B,P), at most ``room`` (P,) each: a run that gets more is full, and the rest is shared out among the others."""
    full = torch.zeros_like(scores, dtype=torch.bool)
    while True:  # once, and again whenever runs overflow
        left = total - (room * full).sum(1, keepdim=True)
        weight = scores.clamp(min=0) * ~full
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, (~full).float())
        weight = weight / (weight.sum(1, keepdim=True) + 1e-6)
        out = (weight * left).floor().long()
        rest, others = left - out.sum(1, keepdim=True), (~full).sum(1, keepdim=True)
        # Fewer than one each, unless the scores are so small that the 1e-6 counts.
        more = rest // others + (torch.arange(scores.shape[1], device=scores.device) < rest % others).long()
        out = out + torch.zeros_like(out).scatter(1, descending(weight.masked_fill(full, -1.0)), more)
        out = torch.where(full, room, out)
        over = out > room
        if not bool(over.any()):
            return out
        full = full | over
