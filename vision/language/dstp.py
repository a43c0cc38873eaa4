"""DSTP's mechanism (arXiv 2604.12358), experimental: visual tokens swap in decode when the answer looks elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import best, keep_best, keep_chosen, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["DSTP"]


@dataclass(frozen=True)
class DSTP(
    Reducer, name="dstp", stage="language", needs=("attention",), paper="2604.12358", title="DSTP (experimental)"
):
    """FastV whose choice is looked at again in every decode step, and swapped when the relevant tokens have shifted.

    **Experimental.** The paper's code and thresholds are not public. What is known is the finding (the visual tokens
    that matter change in the course of an answer that reasons), and that a shift is detected and kept tokens swapped
    for pruned ones at a fixed number. How is ours, so this is no measurement of DSTP.

    Prefill: before ``layer`` the ``keep`` visual tokens stay that the last prompt token attends to most in the layer
    before, as in FastV. Every decode step compares the K visual tokens that hold with the K that the new token attends
    to most in that layer, whose cache has all of them: where less than ``overlap`` of them agree, ``patience`` steps
    in a row, the latter hold from now on. Tokens that enter were set aside when they went (one hidden state each), run
    through the later layers at their original positions beside the new token, see what is live there, and are cached;
    none passes a layer twice. Tokens that leave stay in the caches and are hidden: K are seen, memory grows with those
    that entered.

    Without a shift the answer is that of ``fastv`` with the same settings. Single words as answers cannot show
    anything.

    Args:
        layer: 0-based first layer that sees fewer tokens.
        keep: visual tokens that stay, a count or a ratio, rounded half up; 1/3 as in the paper's figures.
        overlap: share of agreement below which there is a shift, in [0, 1]; 0 never swaps.
        patience: steps in a row, 1 or 2.

    Every sample and beam has its own set; ties go to the lower index; later turns of several new tokens make no choice
    and see all that the caches hold.

    Raises ``ValueError`` for other values and a layer that the model does not have. Patching refuses sliding windows,
    flash attention and other methods inside the language model, and prompts refuse static caches.
    """

    unwindowed: ClassVar[bool] = True

    layer: int = 2
    keep: int | float = 1 / 3
    overlap: float = 0.5
    patience: int = 1

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", 1)
        check_keep(self.keep)
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is a share in [0, 1], not {self.overlap!r}")
        if self.patience not in (1, 2):
            raise ValueError(f"patience is 1 or 2 steps, not {self.patience!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def decode_mode(self) -> str:
        return "revive"

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        row = finite(evidence.attention(evidence.last())[:, :, 0].mean(1), evidence)
        if evidence.held is None:
            return keep_best(row, self.keep, evidence)
        held = evidence.held & visual
        wanted = held.sum(1, keepdim=True)
        asked = best(row, visual, wanted)
        shifted = self._apart(asked, held)
        if self.patience == 2:
            before = evidence.earlier
            if before is None:
                shifted = torch.zeros_like(shifted)
            else:
                earlier = best(before.attention.to(row), visual, wanted)
                shifted = shifted & self._apart(earlier, before.stay & visual)
        return keep_chosen(torch.where(shifted, asked, held), evidence)

    def _apart(self, asked: Tensor, held: Tensor) -> Tensor:
        """(B,1) whether two sets (B,N) of as many tokens agree in less than ``overlap``."""
        number = held.sum(1, keepdim=True).clamp(min=1)
        return (asked & held).sum(1, keepdim=True) < self.overlap * number
