"""VisPruner (arXiv 2412.01818v2): part of the budget for salient tokens, the rest for those that are no duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, kept
from tokenreduce.algorithms.scoring import descending, finite, gram, unit
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, take

__all__ = ["VisPruner"]


@dataclass(frozen=True)
class VisPruner(Salient, name="vispruner", needs=("tower",), paper="2412.01818", title="VisPruner"):
    """VisPruner: salient tokens by class-token attention, and diverse ones from the rest; raster order.

    Of ``keep`` tokens of a view, int(keep * important_ratio) are those with the highest attention. The others, listed
    by descending attention, are thinned in rounds: tokens at even places of the list are compared by cosine (features
    before the projector) with those at odd places, the ``r`` closest to one of them go, and the list becomes the
    survivors by descending similarity followed by the odd places. Order and parity are those of the official code.

    Different from it: an odd list has one more even than odd place (an error there), and a round removes at most as
    many as there are even places and never too many, so that exactly ``keep`` stay (fewer there in rare cases); float32
    scores, stable sorts, and an all-zero feature has similarity 0. Without a class token the ranking is by attention
    received, as in the third-party port to Qwen2.5-VL; that port's extra salient token for odd lists is not needed.

    Args:
        keep: 128 in the authors' example; a count is for the whole image (the official one is per view).
        important_ratio: share of the salient ones in [0, 1]: 0.5 with 128 tokens, 0.75 with 64. 1 is FasterVLM.
        r: tokens removed per round.
        layer, score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 128
    important_ratio: float = 0.5
    r: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.important_ratio
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"important_ratio is a number in [0, 1], not {share!r}")
        check_count(self.r, "r", 1)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        order = descending(self.saliency(evidence))
        important = int(keep * self.important_ratio)
        salient, rest = order[:, :important], order[:, important:]
        return kept(torch.cat([salient, self._diverse(rest, keep - important, evidence)], 1), evidence)

    def _diverse(self, rest: Tensor, wanted: int, evidence: VisualEvidence) -> Tensor:
        """(B,wanted) of the tokens ``rest`` (B,R), which are listed by descending attention."""
        if not wanted:
            return rest[:, :0]
        u = unit(evidence.features[:, evidence.prefix :].detach())
        cosine = finite(gram(u), evidence)
        names = torch.arange(cosine.shape[1], device=rest.device).expand(len(rest), -1)
        while rest.shape[1] > wanted:
            if 2 * rest.shape[1] <= cosine.shape[1]:  # most rows and columns are of tokens that are gone
                names = names.gather(1, rest)
                cosine = take(take(cosine, rest).transpose(1, 2), rest)
                rest = torch.arange(rest.shape[1], device=rest.device).expand(len(rest), -1)
            a, b = rest[:, ::2], rest[:, 1::2]
            r = min(self.r, rest.shape[1] - wanted, a.shape[1])
            closest = take(cosine, b).amax(1).gather(1, a)  # whole rows of b, which cost less than the places of a
            rest = torch.cat([a.gather(1, descending(closest)[:, r:]), b], 1)
        return names.gather(1, rest)
