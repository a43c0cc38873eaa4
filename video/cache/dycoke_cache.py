"""DyCoke's second part (arXiv 2411.15024): in decode, a new token sees the visual tokens that matter to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import best, keep_chosen, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["DyCokeCache"]


@dataclass(frozen=True)
class DyCokeCache(
    Reducer, name="dycoke-cache", stage="cache", needs=("attention",), paper="2411.15024",
    title="DyCoke, dynamic reduction in decode",
):  # fmt: skip
    """DyCoke in decode: from one layer on, a new token sees only the visual tokens that it attends to most.

    In every decode step, a is the new token's softmaxed attention in layer ``layer - 1`` on the visual tokens of the
    prompt, averaged over heads. Where a is like the one of the step before (cosine of ``gate`` or more), the choice of
    that step holds; else the ``int(V * (1 - p))`` of the V visual tokens with the largest a are chosen, at least one.
    All text is seen. Nothing leaves the cache, so a hidden token may be seen again in a later step: this saves
    attention, not memory. The prefill is untouched; ``dycoke`` is the step before the language model, and
    ``dycoke:keep=0.5+dycoke-cache`` is both.

    Args:
        layer: 0-based first layer that sees fewer tokens (the authors' ``dycoke_l``).
        p: share of the visual tokens that is hidden, in [0, 1): 0.7 in the paper, 0.8 in the code.
        keep: instead of ``p``: visual tokens that are seen, a count or a ratio, rounded half up.
        gate: cosine from which on the choice before is used again, in (0, 1]; 0.9 in the code.
        reuse: whether it is, as in the paper. False is the code, where such a step sees every token.

    Decisions: every sample has its own gate and choice (the code takes batches of one); a run starts without a choice
    (the code compares with the last step of the prompt before). Steps of several new tokens (a later turn) see all.

    Raises ``ValueError`` for settings outside these ranges, both ``p`` and ``keep``, and a layer that the model does
    not have.
    """

    unwindowed: ClassVar[bool] = True

    layer: int = 3
    p: float | None = None
    keep: int | float | None = None
    gate: float = 0.9
    reuse: bool = True

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", 1)
        check_keep(self.keep)
        for name, low, high in (("p", 0.0, 1.0), ("gate", 0.0, 1.0)):
            value = getattr(self, name)
            if value is None and name == "p":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or value == (high if name == "p" else low):
                raise ValueError(f"{name} is a number in {'[0, 1)' if name == 'p' else '(0, 1]'}, not {value!r}")
        if self.p is not None and self.keep is not None:
            raise ValueError("give p or keep, not both")
        if not isinstance(self.reuse, bool):
            raise ValueError(f"reuse is true or false, not {self.reuse!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def decode_mode(self) -> str:
        return "hide"

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        row = finite(evidence.attention(evidence.last())[:, :, 0].mean(1), evidence)
        if self.keep is not None:
            wanted = visual_counts(self.keep, evidence)[1]
        else:
            present = visual.sum(1, keepdim=True)
            share = 1 - (0.7 if self.p is None else self.p)
            wanted = torch.minimum((present.double() * share + 1e-9).long().clamp(min=1), present)
        chosen = best(row, visual, wanted)
        if evidence.earlier is not None:
            before = evidence.earlier.attention.to(row) * visual
            alike = F.cosine_similarity(row * visual, before, dim=1).unsqueeze(1) >= self.gate
            chosen = torch.where(alike, visual & evidence.earlier.stay if self.reuse else visual, chosen)
        return keep_chosen(chosen, evidence)
