"""PruneVid inside the language model (arXiv 2412.16117): prune by the question's attention, within segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import best, keep_chosen, packed, question, visual_counts, visual_of
from tokenreduce.algorithms.views import apportion
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["PruneVidPrune"]


@dataclass(frozen=True)
class PruneVidPrune(
    Reducer, name="prunevid-prune", stage="language", needs=("attention", "frames"), paper="2412.16117",
    title="PruneVid, pruning",
):  # fmt: skip
    """PruneVid's question-guided pruning: before one layer, the visual tokens that the question attends to most stay.

    The score of a visual token is its largest attention over all heads and all tokens behind the last visual one, in
    the layer before. The choice is made within groups: the static tokens of a segment (those that stand for several
    frames, as ``prunevid`` before the language model leaves them), and the tokens of one frame. From a group of n,
    int(n * alpha) stay. Behind other methods, or none, every frame is a group; tokens without known frame are one.

    Its counterpart before the language model is ``prunevid``: ``"prunevid+prunevid-prune"``.

    Args:
        alpha: share of every group that stays; a group may vanish, as published.
        keep: instead of ``alpha``: visual tokens that stay, a count or a ratio, shared out among groups by their size.
        layer: 0-based first layer that sees fewer tokens; by default 11 of 32 and as deep in other models (the paper's
            layer M = 10 is the one that is read).

    Decisions: attention is the model's own, behind rotary embedding and causal (the published PLLaVA code recomputes
    it without either). Caches of the layers before are not thinned out, which the published code does. A sample without
    any token behind its last visual one is judged by its last token.

    Raises ``ValueError`` for settings outside these ranges, ``layer`` below 1 or one that the model does not have.
    """

    alpha: float = 0.4
    keep: int | float | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer is not None:
            check_count(self.layer, "layer", 1)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is a share in (0, 1], not {self.alpha!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        wanted = max(int(11 / 32 * depth + 0.5), 1) if self.layer is None else self.layer
        if wanted >= depth:
            raise ValueError(f"layer={wanted}: the language model has layers 0 to {depth - 1}")
        return layer == wanted

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        group = _groups(evidence, visual)
        scores, chosen = _asked(evidence, visual), torch.zeros_like(visual)
        wanted = None if self.keep is None else visual_counts(self.keep, evidence)[1]
        for b in range(evidence.batch):
            _, place, sizes = group[b][visual[b]].unique(return_inverse=True, return_counts=True)
            if wanted is None:
                left = (sizes * self.alpha + 1e-9).long()
            else:
                left = apportion(wanted[b : b + 1], sizes[None].float(), sizes)[0]
            for g, k in enumerate(left.tolist()):
                if k:
                    mine = visual[b].clone()
                    mine[visual[b]] = place == g
                    chosen[b] |= best(scores[b][None], mine[None], torch.tensor([[k]], device=scores.device))[0]
        return keep_chosen(chosen, evidence)


def _asked(evidence: LanguageEvidence, visual: Tensor) -> Tensor:
    """(B,N) largest attention over heads and the tokens of the question."""
    behind = question(visual, evidence.valid)
    last = torch.zeros_like(behind).scatter(1, evidence.last(), True)
    index, there = packed(torch.where(behind.any(1, keepdim=True), behind, last))
    rows = evidence.attention(index)
    if rows.shape[2] == index.shape[1]:  # rows that were given are the question's
        rows = rows.masked_fill(~there[:, None, :, None], 0.0)
    return finite(rows.amax((1, 2)), evidence)


def _groups(evidence: LanguageEvidence, visual: Tensor) -> Tensor:
    """(B,N) a number for every group: a video's tokens that stand for the same frames."""
    film, first, last, _ = evidence.frame_of.unbind(-1)
    wide = int(last.max()) + 2 if last.numel() else 1
    number = (film * wide + first) * wide + last
    return torch.where(film < 0, -1, number)
