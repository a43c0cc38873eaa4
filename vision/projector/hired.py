"""HiRED (arXiv 2408.10945): a token budget split over overview and crops by class-token attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, check_layer, kept, saliency, share
from tokenreduce.algorithms.views import apportion, covered, marked, ranks, rooms
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["HiRED"]

CONTENTS = ("mass", "votes")


@dataclass(frozen=True)
class HiRED(Projector, name="hired", needs=("tower",), paper="2408.10945", title="HiRED"):
    """HiRED: crops share the budget by the attention that the overview pays to their part of the image in an early
    block; in every view the tokens with the highest attention of a late block stay. Raster order.

    Paper and code differ in what a crop deserves: ``content="mass"`` is the paper's sum of attention over the cells of
    the overview that the crop covers, "votes" the code's count of the overview's ``1 - alpha`` most attended tokens in
    as many contiguous strips of the flattened overview as there are crops.

    Different from the official code: exactly ``keep`` tokens stay (fractions go to the largest remainders, what a
    padded crop has no room for to the other crops and then to the overview), the budget counts the tokens that are
    left when padding is cut off, crops without content share evenly, ties go to the lower index, and row ends stay by
    default (``newlines="drop"`` is the official layout). An image of one view keeps the tokens with the highest late
    attention, as on LLaVA-1.5; views without an overview (frames) share evenly. The paper has no rule for towers
    without class token: there both scores are the mean attention received, which is ours.

    Args:
        keep: 0.2 in the paper (token_budget_rate; also 0.4 and 0.1).
        alpha: the overview's share of the budget, 0 to 1.
        l_init, l_final: blocks that rate crops and tokens: 0-based, negative from the end, or a share of the depth;
            None is the block whose output enters the projector (22 of 24 in CLIP-L).
        content: how crops are rated, "mass" or "votes".
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.2
    alpha: float = 0.5
    l_init: int | float | None = 0
    l_final: int | float | None = None
    content: str = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.l_init, "l_init")
        check_layer(self.l_final, "l_final")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a number in [0, 1], not {self.alpha!r}")
        if self.content not in CONTENTS:
            raise ValueError(f"content is one of {CONTENTS}, not {self.content!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.l_init, self.l_final)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        scores = saliency(evidence, self.l_final)
        budget = self.budgets(evidence, keep)
        return kept(marked(ranks(scores, evidence.view) < budget[:, evidence.view], keep), evidence)

    def budgets(self, evidence: VisualEvidence, keep: int) -> Tensor:
        """(B,V) tokens of every view that stay; (1,V) where the image has no crops. They sum to ``keep``."""
        room = rooms(evidence)
        if evidence.crops is None:
            return torch.tensor([share(keep, room.tolist())], device=room.device)
        crops = room[1:]
        first = torch.maximum(room[0].clamp(max=int(self.alpha * keep + 1e-9)), keep - crops.sum())
        rest = apportion(keep - first, self.contents(evidence), crops)
        return torch.cat([first.expand(len(rest), 1), rest], 1)

    def contents(self, evidence: VisualEvidence) -> Tensor:
        """(B,C) what every crop shows, by the overview of an image with crops."""
        early, view = saliency(evidence, self.l_init), evidence.view
        crops = len(rooms(evidence)) - 1
        if self.content == "mass":
            part, worth = covered(evidence), early.masked_fill(view != 0, 0.0)
        else:
            cells = (view == 0).sum()
            voters = (cells * (1 - self.alpha) + 1e-9).long()
            worth = ((ranks(early, view) < voters) & (view == 0)).float()
            part = torch.where(view == 0, 1 + ((view == 0).cumsum(0) - 1) * crops // cells.clamp(min=1), 0)
        out = worth.new_zeros(len(worth), crops + 1)
        return out.scatter_add(1, part.expand_as(worth), worth)[:, 1:]
