"""FlashVID inside the language model (arXiv 2602.08024): late layers see the tokens that are attended to most."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.algorithms.sequence import keep_best
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FlashVIDLLM"]


@dataclass(frozen=True)
class FlashVIDLLM(
    Reducer, name="flashvid-llm", stage="language", needs=("attention",), paper="2602.08024",
    title="FlashVID, in the language model",
):  # fmt: skip
    """FlashVID's inner step: before one layer, drop the visual tokens that the last prompt token attends to least.

    The score is the attention of the layer before, mean over heads; order and positions stay, and decoding makes no new
    choice.

    It pays for the tokens that ``flashvid`` lets in beyond its budget: with 1.25 times as many up to 5/7 of the layers
    and 0.3 of these behind, the mean over layers is the budget, (20 * 1.25 + 8 * 1.25 * 0.3) / 28 = 1. The published
    whole at 0.25 is ``"flashvid:keep=0.25,expansion=1.25+flashvid-llm"``. For Qwen3-VL with its 36 layers the published
    pair is ``layer=28,keep=0.1``, of the same mean.

    Args:
        layer: 0-based first layer that sees fewer tokens; by default 20 of 28, and as deep in other models.
        keep: visual tokens that stay, a count or a ratio, rounded half up (the code rounds up).

    Raises ``ValueError`` for other values, ``layer`` below 1 or one that the model does not have.
    """

    layer: int | None = None
    keep: int | float = 0.3

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_count(self.layer, "layer", 1)
        check_keep(self.keep)

    def acts_at(self, layer: int, depth: int) -> bool:
        wanted = max(int(20 / 28 * depth + 0.5), 1) if self.layer is None else self.layer
        if wanted >= depth:
            raise ValueError(f"layer={wanted}: the language model has layers 0 to {depth - 1}")
        return layer == wanted

    def plan(self, evidence: LanguageEvidence) -> Plan:
        return keep_best(evidence.attention(evidence.last())[:, :, 0].mean(1), self.keep, evidence)
