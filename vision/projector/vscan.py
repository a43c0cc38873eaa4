"""VScan (arXiv 2505.22654), before the language model: a local and a global scan, and every other token is merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, by_class, check_layer, saliency, top
from tokenreduce.algorithms.scoring import descending, finite, inner, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Merge, Plan, take

__all__ = ["VScan"]

QUOTAS = ("auto", "equal", "capped")


@dataclass(frozen=True)
class VScan(Salient, name="vscan", needs=("tower",), paper="2505.22654", title="VScan"):
    """VScan: half of the tokens by shallow attention in every window, the others by deep attention in the whole view.

    Local scan: ``local`` of the budget, rounded down, from non-overlapping windows of the token grid by attention in a
    shallow block. Global scan: what is left of the budget by attention in a deep block, among the other tokens. Every
    token that neither takes joins the kept one of highest cosine similarity in the language model's space, and a kept
    token becomes the plain mean of its group. Raster order. The plan's sizes are those of the groups. ``vscan-llm`` is
    the method's step inside the language model.

    Args:
        keep: officially 96 of 576 with LLaVA-1.5 and a ratio of 0.167 with Qwen2.5-VL.
        local: share of the local scan.
        window: side of a window in tokens; None is 6 with class token (LLaVA), 4 without (Qwen). Rows and columns that
            are left over belong to the last window; there is at least one.
        quota: how many a window gives. "equal": each the same, rounded down, as on LLaVA. "capped": tokens are taken by
            falling score while their window has given fewer than its share rounded up, as on Qwen. "auto" is the first
            with class token, the second without.
        local_layer: shallow block; 5/24 is block 5 of CLIP-L and block 7 (the first with full attention) of Qwen2.5-VL.
        layer, score: deep block and kind of attention, see :class:`~tokenreduce.algorithms.projector.Salient`.
        scaling: weight of the kept token in the mean of its group.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Different from the official code: exactly ``keep`` tokens stay, whatever windows do not give comes from the global
    scan (100 leave 98 there); any grid and any ``keep``; the local choice is out of the global ranking instead of set
    to 0, which could tie; windows without a token and patches that only cover padding take no part, so that nothing is
    merged into tokens that are cut off later; ties, also between equally similar groups, go to the lower index.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 96
    local: float = 0.5
    window: int | None = None
    quota: str = "auto"
    local_layer: int | float | None = 5 / 24
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.local, bool) or not isinstance(self.local, int | float) or not 0 <= self.local <= 1:
            raise ValueError(f"local is a share of the budget, in [0, 1], not {self.local!r}")
        if self.window is not None:
            check_count(self.window, "window", 1)
        if self.quota not in QUOTAS:
            raise ValueError(f"quota is one of {QUOTAS}, not {self.quota!r}")
        check_layer(self.local_layer, "local_layer")
        if isinstance(self.scaling, bool) or not isinstance(self.scaling, int | float) or not 0 < self.scaling < 1e9:
            raise ValueError(f"scaling is a positive number, not {self.scaling!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return self.local_layer, self.layer

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        near = self.scan(evidence, keep)
        # As many local picks in every sample: the windows are the same.
        rest = keep - int(near[0].sum())
        far = self.saliency(evidence).masked_fill(near, float("-inf"))
        stay = near.scatter(1, top(far, rest), True)
        index = (~stay).long().argsort(dim=1, stable=True)
        return self._merge(evidence, index[:, :keep], index[:, keep:])

    def scan(self, evidence: VisualEvidence, keep: int) -> Tensor:
        """(B,N) bool behind the prefix: what the local scan takes when ``keep`` tokens shall stay."""
        with_class = by_class(evidence.tower(self.layer), self.score)
        score = saliency(evidence, self.local_layer, self.score)
        window = _windows(evidence, (6 if with_class else 4) if self.window is None else self.window)
        wanted, many = int(keep * self.local), int(window.max()) + 1
        order = descending(score)
        # Best first within windows: a token's rank is its place less where its window starts.
        by_window = order.gather(1, window[order].argsort(dim=1, stable=True))
        start = torch.bincount(window, minlength=many).cumsum(0) - torch.bincount(window, minlength=many)
        rank = torch.empty_like(order).scatter_(
            1, by_window, torch.arange(len(window), device=order.device) - start[window[by_window]]
        )
        capped = not with_class if self.quota == "auto" else self.quota == "capped"
        if not capped:
            return rank < wanted // many
        open_ = (rank < -(-wanted // many)).gather(1, order)
        return torch.zeros_like(open_).scatter(1, order, open_ & (open_.long().cumsum(1) <= wanted))

    def _merge(self, evidence: VisualEvidence, keep: Tensor, gone: Tensor) -> Plan:
        p, x = evidence.prefix, unit(evidence.x[:, evidence.prefix :].detach())
        group = finite(inner(take(x, gone), take(x, keep)), evidence).argmax(2)
        front = torch.arange(p, device=keep.device).expand(len(keep), -1)
        weights = None
        if self.scaling != 1:
            weights = torch.ones_like(evidence.x[..., 0], dtype=torch.float32).scatter(1, keep + p, self.scaling)
        return Merge(evidence.n, torch.cat([front, keep + p], 1), gone + p, group + p, weights=weights, by_size=False)


def _windows(evidence: VisualEvidence, side: int) -> Tensor:
    """(N,) the window of every token, numbered without gaps."""
    rows, cols = (max(s // side, 1) for s in evidence.shape)
    place = evidence.place // side
    number = place[:, 0].clamp(max=rows - 1) * cols + place[:, 1].clamp(max=cols - 1)
    return number.unique(return_inverse=True)[1]
