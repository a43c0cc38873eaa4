"""DART (arXiv 2502.11494): keep a few pivot tokens and the visual tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, inner, unit
from tokenreduce.algorithms.sequence import best, keep_chosen, question, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["DART"]

_KEEP = 0.222


@dataclass(frozen=True)
class DART(Reducer, name="dart", stage="language", needs=("keys", "norm"), paper="2502.11494", title="DART"):
    """DART: before one layer, keep the visual tokens with the largest keys and those that resemble the pivots least.

    Pivots are the ``pivot_image_token`` visual tokens with the largest L1 norm of their keys (of layer ``layer - 1``,
    behind the rotary embedding, all key heads together) and the ``pivot_text_token`` tokens with the largest norm
    among the real tokens behind a sample's last visual one (question and end of the chat template). Every pivot in
    turn takes the visual tokens with the smallest cosine to it, of the features that enter ``layer`` under the
    language model's final norm. No attention weights are needed.

    Args:
        layer: 0-based first layer that sees fewer tokens (the authors' K).
        keep: visual tokens that stay, image pivots included: a count, or a ratio of those present, rounded half up.
            Exact: what the equal shares of the pivots leave over goes to the tokens whose highest cosine to any pivot
            is smallest. 0.222 when no budget is given (the published reduction of 0.778).
        pivot_image_token, pivot_text_token: numbers of pivots.
        max_num_trunction: instead of ``keep``, the authors' rule for LLaVA-1.5: every pivot takes
            ``max_num_trunction // pivots`` and the image pivots come on top (128 leaves 132).
        reduction_ratio: instead of ``keep``, the rule of the ports: every pivot takes
            ``int(visual * (1 - reduction_ratio) / pivots)`` and the image pivots come on top (0.778 of 576 leaves 124);
            0 keeps everything.

    Decisions: pivots choose in the order visual, then text, each by descending norm (the published code's order
    follows from hashing); ties go to the lower index; where a sample has too few text tokens or candidates, the
    budget is filled as described for ``keep``; in prompts with several images, visual tokens of later images are no
    text; kept tokens keep their original positions, as published.

    Raises ``ValueError`` for ``layer`` below 1 (there are no keys before layer 0) or one that the model does not have,
    no pivots at all, bad budgets, or more than one budget.
    """

    layer: int = 2
    keep: int | float | None = None
    pivot_image_token: int = 4
    pivot_text_token: int = 4
    max_num_trunction: int | None = None
    reduction_ratio: float | None = None

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", 1)
        check_keep(self.keep)
        check_count(self.pivot_image_token, "pivot_image_token")
        check_count(self.pivot_text_token, "pivot_text_token")
        if self.pivot_image_token + self.pivot_text_token < 1:
            raise ValueError("pivot_image_token and pivot_text_token are both 0: at least one pivot is needed")
        if self.max_num_trunction is not None:
            check_count(self.max_num_trunction, "max_num_trunction", 1)
        ratio = self.reduction_ratio
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1):
            raise ValueError(f"reduction_ratio is the share to drop, in [0, 1], not {ratio!r}")
        if sum(v is not None for v in (self.keep, self.max_num_trunction, ratio)) > 1:
            raise ValueError("give one of keep, max_num_trunction and reduction_ratio")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        present, wanted, each = self._budget(evidence)
        if bool((wanted == present).all()):
            return Identity.like(evidence.x)
        norms = finite(evidence.keys.float().abs().sum((1, 3)), evidence)
        image, image_there = _largest(norms, visual, self.pivot_image_token, wanted)
        texts = question(visual, evidence.valid)
        text, text_there = _largest(norms, texts, self.pivot_text_token, texts.sum(1, keepdim=True))
        chosen = torch.zeros_like(visual).scatter(1, image, image_there)
        pivots, there = torch.cat([image, text], 1), torch.cat([image_there, text_there], 1)
        if each is None:
            each = (wanted - chosen.sum(1, keepdim=True)) // there.sum(1, keepdim=True).clamp(min=1)
        h = unit(evidence.normed)
        cosines = finite(inner(_rows(h, pivots), h), evidence)
        chosen = chosen | _take_turns(cosines, there, visual & ~chosen, each)
        # Nothing is left over where every pivot found its share: then the budget is met and this adds no token.
        closest = cosines.masked_fill(~there.unsqueeze(-1), float("-inf")).amax(1)
        rest = wanted - chosen.sum(1, keepdim=True)
        return keep_chosen(chosen | best(-closest, visual & ~chosen, rest), evidence)

    def _budget(self, evidence: LanguageEvidence) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B,1) each: visual tokens, how many stay, and how many each pivot takes where the rule says so."""
        pivots = self.pivot_image_token + self.pivot_text_token
        if self.max_num_trunction is None and self.reduction_ratio is None:
            return *visual_counts(_KEEP if self.keep is None else self.keep, evidence), None
        present = visual_of(evidence).sum(1, keepdim=True)
        if self.max_num_trunction is not None:
            each = torch.full_like(present, self.max_num_trunction // pivots)
        else:
            assert self.reduction_ratio is not None
            each = (present.double() * (1 - self.reduction_ratio) / pivots).long()
        total = present if self.reduction_ratio == 0 else self.pivot_image_token + pivots * each
        return present, total.clamp(min=1).minimum(present), each


def _largest(scores: Tensor, among: Tensor, k: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """``(index, there)``, (B,k) each: the tokens with the highest scores, best first, and which of them exist."""
    k = min(k, scores.shape[1])
    index = descending(scores.masked_fill(~among, float("-inf")))[:, :k]
    return index, torch.arange(k, device=index.device) < limit


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _take_turns(cosines: Tensor, there: Tensor, candidates: Tensor, each: Tensor) -> Tensor:
    """(B,N) bool: what the pivots (rows of ``cosines`` (B,P,N), in the order given) take of the ``candidates``.

    Every pivot that is ``there`` (B,P) takes the ``each`` (B,1) candidates with the smallest cosine to it, which are
    then gone for the pivots behind it.
    """
    chosen = torch.zeros_like(candidates)
    for i in range(cosines.shape[1]):
        chosen = chosen | best(-cosines[:, i], candidates & ~chosen, each * there[:, i : i + 1])
    return chosen
