"""MustDrop (arXiv 2411.10803), prefill: drop visual tokens that the text attends to little, all in all and at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import saliency, top
from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import (
    best,
    check_stages,
    keep_chosen,
    packed,
    question,
    shrink,
    stages_of,
    visual_of,
)
from tokenreduce.core.budget import check_keep
from tokenreduce.core.evidence import LanguageEvidence, Look, VisualEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["MustDrop"]


@dataclass(frozen=True)
class MustDrop(
    Reducer, name="mustdrop", stage="language", needs=("attention", "tower"), paper="2411.10803",
    title="MustDrop, prefill",
):  # fmt: skip
    """MustDrop in prefill: in a few layers, visual tokens leave that no text token attends to, except key tokens.

    P is the softmaxed attention of the question (the real tokens behind a sample's last visual one) on the visual
    tokens, averaged over heads. Token j leaves when its share of all of P is below ``global_thr`` and its largest
    entry in P is below ``individual_thr``. Layers are those whose attention is read; the next one sees fewer tokens.
    Tokens of the key set never leave: in every view of an image, the ``ceil(keep_rate * tokens)`` to which the class
    token attends most in the last block of the vision encoder, averaged over heads.

    It is the method's second phase with the key set of its first, whose merging of windows is ``mustdrop-merge``; the
    key set is then of the tokens that it left. Not part of it: the third phase, which thins the caches of the layers
    before the last cut after prefill. Here each layer's cache keeps the tokens that the layer saw.

    Args:
        pruning_layers: 0-based layers; (2, 6, 10, 14) of 32 and the same places in other depths, fewer where those
            coincide.
        global_thr, individual_thr: in (0, 1]. The defaults are those that the authors call 192 tokens on TextVQA
            (0.0012 and 0.001 for 128, 0.011 and 0.01 for 64); the command line's (1.0 and 0.0) drop nothing. They
            compare probabilities whose scale depends on the length of the prompt, so that the number of tokens left
            differs between images and between models.
        keep_rate: share of the tokens in the key set, in [0, 1]. At 0 there is none, and no vision encoder is needed.
        keep: visual tokens left behind the last of these layers, a count or a ratio of those at the entry of the
            language model, reached by equal ratios. Exact: both thresholds are multiplied by the one factor that
            leaves so many, which ranks tokens by the larger of share / global_thr and maximum / individual_thr. Key
            tokens come first, and in this order where ``keep`` is less than their number.

    Decisions: encoders without class token rank by the attention that a token receives (and tokens made of several
    patches by the mean of theirs); behind a method before the language model, a token is a key token if one that it
    stands for is; at least one visual token stays (with an empty key set all may go in the published code); without a
    question the last real token stands for it; samples decide for themselves (batch 1 there); ties go to the lower
    index; kept tokens keep their original positions (renumbered there).

    Raises ``ValueError`` for settings outside these ranges or layers that the model does not have (the last one prunes
    nothing, since no layer is behind it).
    """

    pruning_layers: tuple[int, ...] | None = None
    global_thr: float = 0.001
    individual_thr: float = 0.001
    keep_rate: float = 0.08
    keep: int | float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pruning_layers, Sequence) and not isinstance(self.pruning_layers, str):
            object.__setattr__(self, "pruning_layers", tuple(self.pruning_layers))
        check_stages(self.pruning_layers, "pruning_layers", 0)
        for name in ("global_thr", "individual_thr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{name} is a threshold in (0, 1] (at 0 nothing is ever dropped), not {value!r}")
        rate = self.keep_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"keep_rate is a share of the tokens in [0, 1], not {rate!r}")
        check_keep(self.keep)

    def required(self) -> tuple[str, ...]:
        return self.needs if self.keep_rate else ("attention",)

    def tower_blocks(self) -> tuple[Look, ...]:
        return (-1,) if self.keep_rate else ()

    def tower_scores(self, evidence: VisualEvidence) -> Tensor:
        """(B,N): 1 for key tokens."""
        scores = saliency(evidence, -1)
        # Less a hair, so that 0.07 of 100 is 7 and not 8.
        key = top(scores, math.ceil(self.keep_rate * scores.shape[1] - 1e-9))
        return torch.zeros_like(scores).scatter(1, key, 1.0)

    def _layers(self, depth: int) -> tuple[int, ...]:
        """The layers before which plans are applied: those behind the pruning layers."""
        if depth < 2:
            raise ValueError(f"pruning layers need a language model of 2 layers, not {depth}")
        if self.pruning_layers is not None:
            return tuple(i + 1 for i in stages_of(self.pruning_layers, depth - 1, "pruning_layers"))
        return tuple(sorted({min((i * depth + 16) // 32, depth - 2) + 1 for i in (2, 6, 10, 14)}))

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual, layers = visual_of(evidence), self._layers(evidence.depth)
        total, largest = _seen(evidence)
        share = total / (total * visual).sum(1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)
        scores = finite(torch.maximum(share / self.global_thr, largest / self.individual_thr), evidence)
        key = visual & (evidence.scores > 0) if self.keep_rate else torch.zeros_like(visual)
        if self.keep is not None:
            wanted = shrink(self.keep, evidence.visual_entry(), layers.index(evidence.layer), len(layers))
            chosen = best(scores, key, wanted)
            return keep_chosen(chosen | best(scores, visual & ~key, wanted - chosen.sum(1, keepdim=True)), evidence)
        chosen = visual & ((scores >= 1) | key)
        one = (~chosen.any(1, keepdim=True)).long()
        return keep_chosen(chosen | best(scores, visual, one), evidence)


def _seen(evidence: LanguageEvidence, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """``(total, largest)``, (B,N) each: sum and maximum over the question of the attention to each token, averaged over
    heads; a few rows at a time, for long questions."""
    rows, there = packed(question(visual_of(evidence), evidence.valid))
    none = ~there.any(1, keepdim=True)
    first = torch.arange(rows.shape[1], device=rows.device) == 0
    rows, there = torch.where(none, evidence.last(), rows), there | (none & first)
    total = torch.zeros_like(evidence.x[..., 0], dtype=torch.float32)
    largest = total
    for part, real in zip(rows.split(chunk, 1), there.split(chunk, 1), strict=True):
        p = torch.where(real.unsqueeze(-1), evidence.attention(part).mean(1), 0.0)
        total, largest = total + p.sum(1), torch.maximum(largest, p.amax(1))
    return total, largest
