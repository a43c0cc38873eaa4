"""MMTok (arXiv 2508.18264): keep the visual tokens that together cover the question and the image best."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenreduce.algorithms.greedy import cover
from tokenreduce.algorithms.projector import Projector, kept
from tokenreduce.algorithms.scoring import clean, gram, inner, question, unit
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["MMTok"]


@dataclass(frozen=True)
class MMTok(Projector, name="mmtok", needs=("text",), paper="2508.18264", title="MMTok"):
    """MMTok: greedy maximum coverage of the words of the question and of all visual tokens of a view; raster order.

    Every word shares 1/m out over the visual tokens (softmax of the cosine to their embeddings behind the projector),
    every visual token alpha/N (softmax of the cosine of the features before it). A set covers of each share the
    largest that one of its tokens has; the token that adds most is taken, ``keep`` times, at ties the first.

    Words are the tokens of the question that the evidence names, all of them, as in the published Qwen recipe; the
    list of function words that the code for LLaVA drops first is a matter of who gathers the text. Without a word
    (also in single samples) only the image is covered. A token is taken once even when nothing is left to cover.
    Patches that only cover padding of a square image are not known here and count like others.

    Args:
        keep: tokens of an image that stay (the official number is per view); 64 of 576 in the paper.
        alpha: weight of covering the visual tokens beside the words.
        tau_tv: temperature of words over visual tokens; 0.02 on LLaVA, 0.01 on Qwen2.5-VL in the paper.
        tau_vv: temperature of visual tokens over visual tokens.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for temperatures that are not above 0, a negative alpha, and what ``Projector`` refuses.
    """

    keep: int | float = 64
    alpha: float = field(default=0.5, kw_only=True)
    tau_tv: float = field(default=0.02, kw_only=True)
    tau_vv: float = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_tv", "tau_vv"):
            if not (_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is a temperature above 0, not {getattr(self, name)!r}")
        if not (_number(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is a weight >= 0, not {self.alpha!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        return kept(self.order(evidence, keep), evidence)

    def order(self, evidence: VisualEvidence, keep: int | None = None) -> Tensor:
        """(B,K) the tokens that stay, counted behind the prefix, in the order in which they are taken: a prefix is the
        answer for a smaller ``keep``."""
        shares = self._shares(evidence)
        return cover(shares, self.total(shares.shape[1]) if keep is None else keep)

    def _shares(self, evidence: VisualEvidence) -> Tensor:
        """(B,N,N+m) what candidate j has of the share of visual token or word r."""
        features = evidence.features.detach()[:, evidence.features.shape[1] - (evidence.n - evidence.prefix) :]
        f, v = clean(unit(features), evidence), clean(unit(evidence.projected.detach()), evidence)
        seen = (gram(f) / self.tau_vv).softmax(1) * (self.alpha / f.shape[1])
        words = question(evidence)
        if words is None:
            return seen
        text, valid = words
        share = valid / valid.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([seen, (inner(v, text) / self.tau_tv).softmax(1) * share.unsqueeze(1)], 2)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
