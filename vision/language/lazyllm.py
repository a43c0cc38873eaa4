"""LazyLLM (arXiv 2407.14057), prefill: drop what the last token attends to least, in three places of the depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.budget import check_keep
from tokenreduce.evidence import Evidence
from tokenreduce.plan import Plan
from tokenreduce.reducer import Reducer
from tokenreduce.scoring import finite
from tokenreduce.sequence import check_stages, keep_best, keep_chosen, shrink, stages_of, visual_of

__all__ = ["LazyLLM"]


@dataclass(frozen=True)
class LazyLLM(
    Reducer, name="lazyllm", stage="language", needs=("attention",), paper="2407.14057", title="LazyLLM, prefill"
):
    """LazyLLM in prefill: in a few layers, visual tokens leave whose attention is below a percentile.

    The score is the softmaxed attention that the last real token pays in the layer before, averaged over heads. Of n
    live visual tokens, those leave whose score is strictly below the ``floor(n * percentile / 100)``-th lowest one
    (counted from 0), so that equal scores stay together. The last token always stays.

    Different from the paper, by what the library does:

    - The paper prunes prompt tokens of any kind. Here only visual tokens may go, and percentiles are over them.
    - Decoding does not bring tokens back; the time to the first token is the method's, the answer behind it is not. In
      the paper every generated token chooses anew among all tokens of the prompt, hidden states of pruned ones are
      stored (the Aux Cache), and one that is chosen later goes through the missing layers then, beside the new token.
      Here the choice of the prefill holds for the whole answer: decoding is cheaper and its caches are shorter, but
      what only a later word of the answer would have looked at is lost from that layer on. The published scores are
      with revival and do not carry over. Why: revived tokens make a decode step of several queries at old positions
      whose number differs between layers and samples, and append keys out of the order of positions; the caches,
      window masks and reordering of beams of the models keep one row of slots in the order of the prompt.

    Args:
        pruning_layers: 0-based first layers that see fewer tokens; 30, 60 and 90 % of the depth (9, 19, 28 of 32).
        percentile: percentage of the live visual tokens that leave, in [0, 100]: one number, or one per layer. 30
            when neither this nor ``keep`` is given, as in the paper's overview (other settings are unpublished).
        keep: instead of ``percentile``: visual tokens left behind the last layer, a count or a ratio of those at the
            entry of the language model, reached by equal ratios. Exact; ties go to the lower index.

    Decisions: original positions stay, of which the paper says nothing.

    Raises ``ValueError`` for settings outside these ranges, both ``percentile`` and ``keep``, or layers that the model
    does not have (by default it needs 4).
    """

    pruning_layers: tuple[int, ...] | None = None
    percentile: float | tuple[float, ...] | None = None
    keep: int | float | None = None

    def __post_init__(self) -> None:
        for name in ("pruning_layers", "percentile"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_stages(self.pruning_layers, "pruning_layers", 1)
        check_keep(self.keep)
        if self.percentile is None:
            return
        if self.keep is not None:
            raise ValueError("give percentile or keep, not both")
        values = self.percentile if isinstance(self.percentile, tuple) else (self.percentile,)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"percentile is a number in [0, 100], or one per layer, not {self.percentile!r}")
        stages = 3 if self.pruning_layers is None else len(self.pruning_layers)
        if isinstance(self.percentile, tuple) and len(values) != stages:
            raise ValueError(f"percentile lists {len(values)} numbers for {stages} layers; give one each")

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.pruning_layers is not None:
            return stages_of(self.pruning_layers, depth, "pruning_layers")
        if depth < 4:
            raise ValueError(
                f"three pruning layers need a language model of 4 layers, not {depth}; give pruning_layers"
            )
        return tuple(depth * i // 10 for i in (3, 6, 9))

    def acts(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def plan(self, evidence: Evidence) -> Plan:
        visual, last, layers = visual_of(evidence), evidence.last(), self._layers(evidence.depth)
        stage = layers.index(evidence.layer)
        scores = finite(evidence.attention(last)[:, :, 0].mean(1), evidence).scatter(1, last, float("inf"))
        if self.keep is not None:
            return keep_best(scores, shrink(self.keep, evidence.visual_entry(), stage, len(layers)), evidence)
        percent = 30.0 if self.percentile is None else self.percentile
        percent = percent[stage] if isinstance(percent, tuple) else percent
        return keep_chosen(visual & (scores >= _threshold(scores, visual, percent)), evidence)


def _threshold(scores: Tensor, among: Tensor, percent: float) -> Tensor:
    """(B,1): the score ``among`` (B,N) that ``percent`` of them, rounded down, are not above; infinity for all."""
    ascending = scores.masked_fill(~among, float("inf")).sort(1).values
    ascending = torch.cat([ascending, torch.full_like(ascending[:, :1], float("inf"))], 1)
    return ascending.gather(1, (among.sum(1, keepdim=True).double() * percent / 100).long())
