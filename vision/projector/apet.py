"""ApET (arXiv 2602.19870), before the language model: keep what a small basis of tokens cannot express."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import draw
from tokenreduce.algorithms.basis import approximated, check_basis
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.scoring import clean
from tokenreduce.core.evidence import ImageEvidence, VisualEvidence
from tokenreduce.core.plan import Mix, Plan

__all__ = ["ApET"]


@dataclass(frozen=True)
class ApET(Projector, name="apet", paper="2602.19870", title="ApET"):
    """ApET: the tokens that are approximated worst from a few others stay, and take in all that go.

    A basis of ``basis_token_num`` tokens is found by farthest point sampling (Euclidean); every token is expressed by
    it (ridge regression), and its error is the length of what is left over. The ``keep`` tokens with the largest errors
    stay. As in the code for LLaVA, the last of them, as many as the basis has, are overwritten by the basis vectors
    (slots by their places, vectors in the order of sampling), because basis tokens have no error of their own; the
    others are carriers, and every token that goes joins the carrier of highest cosine, as a plain mean. Raster order.

    ``basis="kept"`` is the form that the paper's words mean: the basis tokens stay at their own places, beside the
    largest errors among the others. It is the default where a token is made of several patches (Qwen, InternVL) and
    has an original place in the image; the official code for Qwen2.5-VL takes half of each vector instead, in
    bfloat16, which is not offered. ``apet-llm`` is the method's second step, inside the language model:
    ``"apet:keep=96+apet-llm:keep=32"`` is the setting called 64 tokens.

    Different from the official code: the first token of the sampling is drawn by a hash of ``seed`` and the image
    instead of at random; a basis takes half of ``keep`` at most; keeping all is the identity at every size; sums are
    float32. Ties go to the lower index. With ``keep`` above N less the basis, basis tokens are kept for their errors,
    which are rounding there.

    Args:
        keep: 192 or 96 in the paper's scripts.
        basis_token_num: size of the basis; 10 in the scripts, a tenth of the tokens in the paper.
        ridge: lambda of the regression, > 0; 1e-5.
        basis: "slots", "kept" or None, see above.
        start: the first token of the sampling, counted behind the prefix (the last one where there are fewer); None
            draws it. ``seed``: another seed, another draw.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    space: ClassVar[str] = "vision"

    keep: int | float = 192
    basis_token_num: int = 10
    ridge: float = 1e-5
    basis: str | None = None
    start: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis(self.basis, self.basis_token_num, self.ridge, self.start, self.seed)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        p = evidence.prefix
        x = clean(evidence.x[:, p:].detach().float(), evidence)
        several = isinstance(evidence, ImageEvidence) and evidence.origin.index.shape[1] > 1
        kept = several if self.basis is None else self.basis == "kept"
        front = torch.arange(p, device=x.device)
        samples = []
        for row, start in zip(x, self._starts(evidence).tolist(), strict=True):
            stay, (src, into, weight, own) = approximated(
                row, keep, self.basis_token_num, self.ridge, start, kept, by_place=True
            )
            to = torch.cat([torch.arange(keep, device=x.device), torch.searchsorted(stay, into)])
            samples.append((
                torch.cat([front, p + stay]), torch.cat([front, p + stay, p + src]), torch.cat([front, p + to]),
                torch.cat([torch.ones_like(front, dtype=weight.dtype), own[stay], weight]),
            ))  # fmt: skip
        return Mix.from_samples(evidence.n, samples)

    def _starts(self, evidence: VisualEvidence) -> Tensor:
        """(B,) where the sampling begins."""
        free = evidence.n - evidence.prefix
        if self.start is not None:
            return torch.full((evidence.batch,), min(self.start, free - 1))
        return draw(evidence, self.seed)[:, evidence.prefix :].argmax(1)
