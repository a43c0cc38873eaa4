"""GlobalCom2 (arXiv 2501.05179): the overview of an image says how many tokens every crop keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenreduce.algorithms.projector import Projector, check_layer, kept, share
from tokenreduce.algorithms.scoring import cls_logits, finite
from tokenreduce.algorithms.views import apportion, covered, ranks, rooms
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["GlobalCom2"]


@dataclass(frozen=True)
class GlobalCom2(Projector, name="globalcom2", needs=("tower", "cls"), paper="2501.05179", title="GlobalCom2"):
    """GlobalCom2: crops that the overview finds rich keep more; their tokens are ranked by both views of them.

    Scores are the class token's logits of the last block before softmax, mean over heads (as in the repository; the
    features come from an earlier block). The overview keeps its share of the budget. A crop keeps a share of
    1 + sigma - mean(sigma) times the ratio, sigma being a softmax over the crops of the summed scores of the overview's
    cells that they cover, divided by ``temperature``. In a crop a token scores ``(1 - alpha)`` times its own score plus
    ``alpha`` times that of the overview, resized bilinearly to the crops without padding, each divided by its norm over
    the tokens of the crop. Order: the overview's tokens by falling score, then those of the crops in raster order over
    all of them.

    Different from the official code: tokens stay at their place where padding is cut off (there rows are shifted),
    every image of a batch uses its own overview, the features keep their dtype, and exactly ``keep`` tokens stay: the
    overview's number is truncated, the crops share the rest in proportion to ratio times tokens, with fractions to the
    largest remainders and what a crop has no room for to the others. Row ends all stay by default.

    The method is made for an overview and crops. An image of one view is treated as an overview alone; views without
    an overview (frames) share the budget evenly and are ranked by their own scores, in raster order. It needs a class
    token. Softmax rows given instead of queries and keys stand for logits by their logarithm.

    Args:
        keep: 0.25 in the repository (retention_ratio), 0.1 is the other budget of the paper's abstract.
        temperature: of the softmax over crops, above 0; made for the scale of logits.
        alpha: weight of the overview's score in a crop, 0 to 1 (the repository adds both, which is 0.5).
        layer: block of the tower that is read, see :class:`~tokenreduce.algorithms.projector.Salient`; the last by
            default.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for a tower without class token.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.25
    temperature: float = 10.0
    alpha: float = 0.5
    layer: int | float | None = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        tau, alpha = self.temperature, self.alpha
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < float("inf"):
            raise ValueError(f"temperature is a finite number above 0, not {tau!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a number in [0, 1], not {alpha!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.layer,)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        seen, view, room = evidence.tower(self.layer), evidence.view, rooms(evidence)
        own = finite(seen.per_token(cls_logits)[:, seen.prefix :].float(), evidence)
        if evidence.crops is None:
            scores, budget = own, torch.tensor([share(keep, room.tolist())], device=room.device)
        else:
            scores, budget = self.scores(own, evidence), self.budgets(own, evidence, keep)
        rank = ranks(scores, view)
        stay = rank < budget[:, view]
        place = torch.arange(len(view), device=view.device)
        if evidence.crops is not None or len(room) == 1:
            place = torch.where(view == 0, rank, len(view) + place)
        order = torch.where(stay, place, 2 * len(view)).argsort(dim=1, stable=True)
        return kept(order[:, :keep], evidence, raster=False)

    def budgets(self, own: Tensor, evidence: VisualEvidence, keep: int) -> Tensor:
        """(B,V) tokens of every view that stay, from the scores ``own`` (B,N); they sum to ``keep``."""
        room = rooms(evidence)
        first = keep * room[0] // len(evidence.view)
        worth = own.new_zeros(len(own), len(room)).scatter_add(1, covered(evidence).expand_as(own), own)[:, 1:]
        z = ((worth - worth.amax(1, keepdim=True)) / self.temperature).exp()
        sigma = z / (z.sum(1, keepdim=True) + 1e-8)
        ratio = 1 + sigma - sigma.mean(1, keepdim=True)
        rest = apportion(keep - first, ratio * room[1:], room[1:])
        return torch.cat([first.expand(len(rest), 1), rest], 1)

    def scores(self, own: Tensor, evidence: VisualEvidence) -> Tensor:
        """(B,N) the scores ``own`` (B,N) of the overview, and those of the crops together with what it says of them."""
        (h, w), place, crop = evidence.shape, evidence.place, evidence.view > 0
        if not bool(crop.any()):
            return own
        cell = torch.where(crop, h * w, place[:, 0] * w + place[:, 1])
        overview = own.new_zeros(len(own), h * w + 1).scatter(1, cell.expand_as(own), own)[:, : h * w].view(-1, 1, h, w)
        corner = place[crop].amin(0)
        rows, columns = (place[crop].amax(0) - corner + 1).tolist()
        resized = interpolate(overview, (rows, columns), mode="bilinear", align_corners=False).flatten(1)
        at = ((place[:, 0] - corner[0]) * columns + place[:, 1] - corner[1]).masked_fill(~crop, 0)
        both = (1 - self.alpha) * self._unit(own, evidence) + self.alpha * self._unit(resized[:, at], evidence)
        return torch.where(crop, both, own)

    def _unit(self, scores: Tensor, evidence: VisualEvidence) -> Tensor:
        """``scores`` (B,N) divided by their norm over the tokens of a view."""
        view = evidence.view
        power = scores.new_zeros(len(scores), len(rooms(evidence))).scatter_add(1, view.expand_as(scores), scores**2)
        return scores / power.sqrt().clamp(min=1e-12)[:, view]
