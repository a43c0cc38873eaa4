"""LazyLLM (arXiv 2407.14057): every new token chooses, in three places of the depth, what it will not look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import check_stages, keep_best, keep_chosen, shrink, stages_of, visual_of
from tokenreduce.core.budget import check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["LazyLLM"]


@dataclass(frozen=True)
class LazyLLM(Reducer, name="lazyllm", stage="language", needs=("attention",), paper="2407.14057", title="LazyLLM"):
    """LazyLLM: in a few layers, visual tokens leave whose attention is below a percentile, and come back when a later
    token of the answer asks for them.

    The score is the softmaxed attention that the last real token pays in the layer before, averaged over heads. Of n
    live visual tokens, those leave whose score is strictly below the ``floor(n * percentile / 100)``-th lowest one
    (counted from 0), so that equal scores stay together. The last token always stays. The prefill does so once; every
    decode step starts from all tokens again and chooses with the attention of its own token. One that was let go
    before and is chosen now continues where it stopped: its features were set aside (the Aux Cache: C numbers per
    token, where keys and values take twice the width of the key heads in every layer), go through the layers up to the
    next choice beside the new token, see what is live and before them, and their keys join the caches. No token passes
    a layer twice.

    Different from the paper: it prunes prompt tokens of any kind. Here only visual tokens may go, and percentiles are
    over them.

    Args:
        pruning_layers: 0-based first layers that see fewer tokens; 30, 60 and 90 % of the depth (9, 19, 28 of 32).
        percentile: percentage of the live visual tokens that leave, in [0, 100]: one number, or one per layer. 30
            when neither this nor ``keep`` is given, as in the paper's overview (other settings are unpublished).
        keep: instead of ``percentile``: visual tokens left behind the last layer, a count or a ratio of those at the
            entry of the language model, reached by equal ratios. Exact; ties go to the lower index.
        revive: whether decode steps choose anew. False leaves the choice of the prefill for the whole answer: caches
            stay shorter, and what only a later word would have looked at is lost from that layer on; the published
            scores are with revival.

    Decisions, of which the paper says nothing: original positions stay; tokens that come back see the live ones only;
    later turns of several new tokens make no choice and see all that the caches hold.

    Raises ``ValueError`` for settings outside these ranges, both ``percentile`` and ``keep``, or layers that the model
    does not have (by default it needs 4). With ``revive``, patching refuses sliding windows, flash attention and other
    methods inside the language model, and prompts refuse static caches.
    """

    pruning_layers: tuple[int, ...] | None = None
    percentile: float | tuple[float, ...] | None = None
    keep: int | float | None = None
    revive: bool = True

    def __post_init__(self) -> None:
        for name in ("pruning_layers", "percentile"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_stages(self.pruning_layers, "pruning_layers", 1)
        check_keep(self.keep)
        if not isinstance(self.revive, bool):
            raise ValueError(f"revive is true or false, not {self.revive!r}")
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

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def decode_mode(self) -> str:
        return "revive" if self.revive else ""

    def plan(self, evidence: LanguageEvidence) -> Plan:
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
