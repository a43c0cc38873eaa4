"""VScan (arXiv 2505.22654), inside the language model: the last prompt token looks once more at the visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.algorithms.sequence import check_stages, keep_best, shrink, stages_of
from tokenreduce.core.budget import check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["VScanLLM"]

_KEEP = 1 / 3


@dataclass(frozen=True)
class VScanLLM(
    Reducer,
    name="vscan-llm",
    stage="language",
    needs=("ahead", "plain", "attention"),
    paper="2505.22654",
    title="VScan (LLM)",
):
    """VScan's step in the language model: in its middle, keep the visual tokens that the prompt's last token sees most.

    The score at layer L is the softmaxed attention (over the whole sequence, float32) that layer L itself would pay
    from the last real token to each visual token before anything is dropped there, averaged over heads; grouped key
    heads are repeated. Layer L is the first that sees fewer tokens. The official lists count from 1 and name the last
    layer that sees all, which is the same number. Decoding makes no new choice. ``vscan`` is the step before the
    language model: ``vscan:keep=96+vscan-llm:keep=32`` is the official setting for LLaVA-1.5, 64 tokens on average.

    Args:
        layer_list: layers, 0-based and ascending; by default the middle of the model (16 of 32 layers, 14 of 28).
        keep: visual tokens left behind the last of them, a count or a ratio of those at the entry of the language
            model, reached by equal ratios where there are several layers. A third without it and ``counts`` (the
            published 32 of 96, and 0.333).
        counts: instead of ``keep``, what each layer leaves: counts, or shares of the visual tokens that reach it,
            rounded half up.
        rotary: whether the score's queries and keys are rotated on models with M-RoPE, too. The code for Qwen switches
            the rotation off, which is the default; elsewhere they always are, as in the code for LLaVA.

    Decisions: at least one visual token stays. Kept tokens keep their original positions, as with every language-stage
    method here (the code for LLaVA renumbers them).

    Raises ``ValueError`` for bad budgets, both ``keep`` and ``counts``, lists of different lengths, and layers below 1
    or that the model does not have.
    """

    layer_list: tuple[int, ...] | None = None
    keep: int | float | None = None
    counts: tuple[int | float, ...] | None = None
    rotary: bool = False

    def __post_init__(self) -> None:
        for name in ("layer_list", "counts"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_stages(self.layer_list, "layer_list", 1)
        check_keep(self.keep)
        if not isinstance(self.rotary, bool):
            raise ValueError(f"rotary is true or false, not {self.rotary!r}")
        if self.counts is None:
            return
        if self.keep is not None:
            raise ValueError("give counts or keep, not both")
        stages = 1 if self.layer_list is None else len(self.layer_list)
        if not isinstance(self.counts, tuple) or len(self.counts) != stages:
            raise ValueError(f"counts is a tuple with one number for each of {stages} layers, not {self.counts!r}")
        for value in self.counts:
            if value is None:
                raise ValueError("counts holds numbers of tokens (int >= 1) or ratios (float in (0, 1]), not None")
            check_keep(value, "counts")

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.layer_list is not None:
            return stages_of(self.layer_list, depth, "layer_list")
        if depth < 2:
            raise ValueError("a language model of one layer has no middle: there are no layers before and behind it")
        return (depth // 2,)

    def required(self) -> tuple[str, ...]:
        return tuple(need for need in self.needs if need != "plain" or not self.rotary)

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def plan(self, evidence: LanguageEvidence) -> Plan:
        layers = self._layers(evidence.depth)
        stage = layers.index(evidence.layer)
        scores = evidence.attention(evidence.last())[:, :, 0].mean(1)
        if self.counts is not None:
            return keep_best(scores, self.counts[stage], evidence)
        keep = _KEEP if self.keep is None else self.keep
        return keep_best(scores, shrink(keep, evidence.visual_entry(), stage, len(layers)), evidence)
