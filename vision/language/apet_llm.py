"""ApET (arXiv 2602.19870), inside the language model: once more keep what a small basis of tokens cannot express."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tokenreduce.algorithms.baseline import draw
from tokenreduce.algorithms.basis import approximated, check_basis
from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import keep_mixed, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["ApETLLM"]


@dataclass(frozen=True)
class ApETLLM(Reducer, name="apet-llm", stage="language", needs=(), paper="2602.19870", title="ApET (LLM)"):
    """ApET's step in the language model: before one layer, the visual tokens that a few others express worst stay, and
    take in those that go. No attention is needed.

    The steps are those of ``apet``, on the features that enter the layer. As in the code for LLaVA, basis vectors go
    into the slots of the smallest kept errors, by falling error and in the order of sampling; ``basis="kept"`` lets the
    basis tokens stay at their own places instead, which is meant for models with M-RoPE. Original positions stay (the
    code for LLaVA renumbers them from here on). The visual tokens of several images are one set.

    Args:
        layer: 0-based first layer that sees fewer tokens; None is the middle of the model (16 of 32).
        keep: visual tokens that stay, a count or a ratio, rounded half up; 32 behind an ``apet:keep=96`` in the
            scripts.
        basis_token_num, ridge, basis, start, seed: as in ``apet``; ``start`` counts visual tokens.

    Raises ``ValueError`` for values other than these and a layer that the model does not have.
    """

    layer: int | None = None
    keep: int | float = 32
    basis_token_num: int = 10
    ridge: float = 1e-5
    basis: str = "slots"
    start: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_count(self.layer, "layer")
        check_keep(self.keep)
        check_basis(self.basis, self.basis_token_num, self.ridge, self.start, self.seed)

    def acts_at(self, layer: int, depth: int) -> bool:
        wanted = depth // 2 if self.layer is None else self.layer
        if wanted >= depth:
            raise ValueError(f"layer={wanted}: the language model has layers 0 to {depth - 1}")
        return layer == wanted

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        present, wanted = visual_counts(self.keep, evidence)
        if bool((wanted >= present).all()):
            return Identity.like(evidence.x)
        finite(evidence.x.detach().float().sum(-1).masked_fill(~visual, 0.0), evidence)
        draws = draw(evidence, self.seed, visual).masked_fill(~visual, -1.0) if self.start is None else None
        stay, joined = torch.ones_like(visual), []
        for b, keep in enumerate(wanted.flatten().tolist()):
            where = visual[b].nonzero().flatten()
            none, own = where[:0], torch.ones(evidence.n, device=where.device)
            if keep >= len(where):
                joined.append((none, none, none.float(), own))
                continue
            start = min(self.start, len(where) - 1) if self.start is not None else None
            start = int(draws[b, where].argmax()) if start is None and draws is not None else start or 0
            x = evidence.x[b, where].detach().float()
            left, (src, into, weight, mine) = approximated(
                x, keep, self.basis_token_num, self.ridge, start, self.basis == "kept", by_place=False
            )
            stay[b, where] = False
            stay[b, where[left]] = True
            own[where] = mine
            joined.append((where[src], where[into], weight, own))
        return keep_mixed(stay, joined, evidence)
