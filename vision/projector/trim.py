"""TRIM (arXiv 2409.10994): keep the visual tokens that CLIP relates to the question, and the mean of all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import AUTO, Projector, check_clip, clip_named, top
from tokenreduce.algorithms.scoring import finite, inner, relevance
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Pool

__all__ = ["TRIM"]


@dataclass(frozen=True)
class TRIM(Projector, name="trim", needs=("text",), paper="2409.10994", title="TRIM"):
    """TRIM: the ``keep - 1`` tokens of the highest weight in raster order, then one token that is the plain mean of the
    features of all others and goes through the projector like them.

    With ``clip`` the weight is the softmax over the tokens of MINUS the dot product (not normalised) of a patch and the
    question in CLIP's joint space, as in the official code: the lowest similarity first. Only the first segment of a
    question is read, 77 tokens. Without ``clip`` it is the softmax of the mean cosine between the embedding of a token
    behind the projector and those of the words of the question in the language model's own space, not negated; this
    port is ours. A sample without a word keeps evenly spaced tokens, and by the outlier rule only the mean.

    Args:
        keep: outputs of an image, the mean token counted (the official number K leaves K + 1); the default is what is
            left on average in the paper, 21 %. 1 is the mean alone. None is the outlier rule of the paper: every sample
            of every view keeps the tokens whose weight is above Q3 + iqr_factor (Q3 - Q1) of its weights, quartiles
            interpolated linearly, and the mean token; samples then differ in length. (Officially one number for the
            whole batch, which fails where nothing is an outlier.)
        iqr_factor: that factor.
        clip: Hub id or folder of the CLIP model that the vision tower is from, such as
            "openai/clip-vit-large-patch14-336", or "world-clip-2"; None for relevance in the language model's space;
            "auto" for the CLIP that the language model names in its config (``clip_model``, as world-llava-2 does), and
            None where it names none.
        sign: factor on the similarity, -1 or 1; None is -1 with ``clip`` (1 where its patches were taught to answer
            texts, as those of world-clip-2) and 1 without.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    space: ClassVar[str] = "vision"
    adaptive: ClassVar[bool] = True

    keep: int | float | None = 0.21
    iqr_factor: float = field(default=1.5, kw_only=True)
    clip: str | None = field(default=AUTO, kw_only=True)
    sign: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip, self.sign)
        wrong = isinstance(self.iqr_factor, bool) or not isinstance(self.iqr_factor, int | float)
        if wrong or not 0 <= self.iqr_factor < float("inf"):
            raise ValueError(f"iqr_factor is a finite number >= 0, not {self.iqr_factor!r}")

    def required(self) -> tuple[str, ...]:
        return ("clip",) if clip_named(self.clip) else ("text",)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        score, known = self.score(evidence)
        n = score.shape[1]
        if self.keep is None:
            weight = score.softmax(1)
            low, high = weight.quantile(score.new_tensor([0.25, 0.75]), dim=1).unsqueeze(-1)
            stay = weight > high + self.iqr_factor * (high - low)
            number = stay.sum(1)  # high weights are the highest scores, so that a count says which
            best = top(score, int(number.max()))
        else:
            even = (2 * torch.arange(keep - 1, device=score.device) + 1) * n // (2 * max(keep - 1, 1))
            best = torch.where(known[:, None], top(score, keep - 1), even)
            number = torch.full_like(best[:, :1].sum(1), keep - 1)
        return self._mean_of_rest(evidence, best, number)

    def score(self, evidence: VisualEvidence) -> tuple[Tensor, Tensor]:
        """(B,N) logits of the weights of the tokens behind the prefix, and (B,) bool which samples have a text."""
        if not clip_named(self.clip):
            s = relevance(evidence)
            known = torch.zeros_like(s[:, 0], dtype=torch.bool)
            if evidence.text is not None:
                known = ~known if evidence.text_valid is None else evidence.text_valid.any(1)
        else:
            patches, text = evidence.clip
            text = text.detach()[:, :1]
            s = inner(patches.detach()[:, patches.shape[1] - (evidence.n - evidence.prefix) :], text).squeeze(-1)
            known = (text != 0).any(-1).squeeze(1)
        return finite(s * (self.sign or (-1 if clip_named(self.clip) else 1)), evidence), known

    def _mean_of_rest(self, evidence: VisualEvidence, best: Tensor, number: Tensor) -> Plan:
        """The prefix, the first ``number`` (B,) tokens of ``best`` (B,K) in raster order, and the mean of the others;
        slots that a sample does not need come behind the prefix, so that the last token stays last."""
        p, k, device = evidence.prefix, best.shape[1], best.device
        there = torch.arange(k, device=device) < number[:, None]
        stay = torch.zeros(len(best), evidence.n, dtype=torch.bool, device=device)
        stay = stay.scatter(1, best + p, there)
        first = torch.arange(p, device=device).expand(len(best), -1)
        index = (best + p).masked_fill(~there, -1).sort(1).values
        real = stay.new_ones(len(best), 1)
        valid = torch.cat([real.expand(-1, p), index >= 0, real], 1)
        stay[:, :p] = True
        place = torch.arange(evidence.n, device=device).masked_fill(stay, -1)
        keep = torch.cat([first, index.clamp(min=0), place.amax(1, keepdim=True)], 1)
        weights = torch.zeros(len(best), p + k + 1, evidence.n, device=device).scatter(2, keep.unsqueeze(-1), 1.0)
        weights = weights * valid.unsqueeze(-1)
        weights[:, -1] = ~stay / (~stay).sum(1, keepdim=True)
        # Means without a division by the row sum, so that half precision rounds the weights once.
        return Pool(evidence.n, weights, normalised=False, valid=valid if self.keep is None else None, keep=keep)
