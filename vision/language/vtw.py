"""VTW (arXiv 2405.05803): from one layer on the language model sees no visual token at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import keep_chosen, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["VTW"]


@dataclass(frozen=True)
class VTW(Reducer, name="vtw", stage="language", needs=(), paper="2405.05803", title="Visual token withdrawal"):
    """VTW: all visual tokens leave before one layer. Layers before it keep their keys, also for the answer.

    A baseline that suits short answers: captions, reading and grounding collapse where tokens leave early. Text keeps
    its original positions (``pe_type`` "keep" of the code; its compact positions are not offered). A prompt that ends
    in an image keeps the last token, from which the answer is predicted.

    The layer is found offline in the paper, on about 20 samples: from layer 5 on, the first where withdrawal hardly
    changes the first token of the answers (a divergence of at most 0.003 for LLaVA-1.5-7B), see
    :func:`tokenreduce.measure.withdrawal.withdrawal_layer`. ``keep`` states the cost instead.

    Args:
        layer: 0-based first layer without visual tokens; 15 of 32 and as deep in other models when neither this nor
            ``keep`` is given. The number of layers keeps everything, 0 leaves a model of text.
        keep: instead of ``layer``, the mean of the visual tokens over the layers, as a share of those at the entry, or
            a count: they leave before layer round(share * layers), half to even, but never before layer 1. With a count
            the layer depends on the prompt, and the method is asked before every layer.

    Raises ``ValueError`` for other values, both at once, and a layer that the model does not have.
    """

    layer: int | None = None
    keep: int | float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer is not None:
            check_count(self.layer, "layer")
            if self.keep is not None:
                raise ValueError("give layer or keep, not both")

    def acts_at(self, layer: int, depth: int) -> bool:
        if isinstance(self.keep, int):
            return layer > 0
        if self.layer is not None and self.layer > depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}; {depth} keeps all")
        return layer == self._layer(depth)

    def _layer(self, depth: int) -> int:
        if self.layer is not None:
            return self.layer
        return int(15 / 32 * depth + 0.5) if self.keep is None else max(round(self.keep * depth), 1)

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        finite(evidence.x.detach().float().sum(-1).masked_fill(~visual, 0.0), evidence)
        stays = torch.zeros_like(visual)
        if isinstance(self.keep, int):
            first = evidence.visual_entry().double().clamp(min=1)
            until = (self.keep / first * evidence.depth).round().clamp(min=1)
            stays = visual & (evidence.layer < until)
        return Identity.like(evidence.x) if not bool(visual.any()) else keep_chosen(stays, evidence)
