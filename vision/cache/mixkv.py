"""MixKV (arXiv 2510.20707): keys are worth attention, large values, and being unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.algorithms.keys import candidates, check_finite
from tokenreduce.algorithms.scoring import unit
from tokenreduce.algorithms.wrapped import OnScorer
from tokenreduce.core.budget import Keep
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["MixKV"]

_METHODS = ("headwisemixkv", "mixkv", "keydiff", "attn")
_EPS = 1e-8


@dataclass(frozen=True)
class MixKV(OnScorer, KeyScorer, name="mixkv", needs=("attention",), paper="2510.20707", title="MixKV"):
    """MixKV: behind each layer's prefill, rank keys by a mix of another method's score, value norms and diversity.

    In each KV head, with the score a of ``base``: the values' norms v, and d, minus the inner product of a key's unit
    vector with the mean of all of them (text and window included), are mapped to [0, 1] over the slots that compete
    and scaled to the mean of a. With r the mean cosine between different keys of the head, clamped to [0, 1], a key is
    worth r d + (1 - r) (a + v). What always stays, and how many, is the base's own matter, so that
    ``mixkv:base=pyramidkv`` follows that method's schedule; ``adakv:base=mixkv`` shares the budget of the heads by a
    alone, and ranks by the mix, as the official code does.

    Args:
        base: the method that is mixed in, with its settings in quotes: ``mixkv:base='snapkv:kernel_size=7'``. Its
            scores must be masses of attention, not below 0.
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        select_method: "headwisemixkv"; "mixkv" is 0.33 (d + a + v), "keydiff" d alone, "attn" the base alone.
        redundancy: instead of r computed from the keys at hand (the paper): a table of one number for each layer and
            KV head. The official code reads such a table, made from Qwen2-VL, for every model.

    Ranges have an epsilon, so that equal norms count 0 (in the code they are NaN).

    Raises ``ValueError`` for another ``select_method``, a base that does not rank keys once behind each layer, and in a
    forward for a base with negative scores and a table of another shape.
    """

    base: str = "snapkv"
    select_method: str = "headwisemixkv"
    redundancy: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select_method not in _METHODS:
            raise ValueError(f"select_method={self.select_method!r}: choose one of {', '.join(_METHODS)}")
        _ = self.inner  # raises for a base that cannot be

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return self.inner.always(evidence)

    def mass(self, evidence: CacheEvidence) -> Tensor:
        return self.inner.mass(evidence)

    def wanted(self, evidence: CacheEvidence) -> Keep | Tensor:
        return self.inner.wanted(evidence)

    def importance(self, evidence: CacheEvidence) -> Tensor:
        outside = self.inner.importance(evidence).float()
        free, always = candidates(evidence, self.what), self.always(evidence)
        if always is not None:
            free = free & ~always
        if self.select_method == "attn":
            return outside
        check_finite(outside, free)
        if bool((outside < 0)[free].any()):
            raise ValueError(f"mixkv: the scores of base={self.base!r} are below 0, no mass of attention; give snapkv")
        there = evidence.there.float()
        number = there.sum(1, keepdim=True)
        keys = unit(evidence.keys.masked_fill(~evidence.there.unsqueeze(-1), 0.0))  # padding may hold anything
        mean = keys.sum(1) / number.clamp(min=1)
        level = _mean(outside, free)
        other = _scaled(-(keys @ mean.unsqueeze(-1)).squeeze(-1), free, level)
        inside = _scaled(evidence.values.float().norm(dim=-1), free, level)
        if self.select_method == "keydiff":
            return other
        if self.select_method == "mixkv":
            return 0.33 * (other + outside + inside)
        if self.redundancy is None:
            alike = (number * mean.square().sum(1, keepdim=True) - 1) / (number - 1).clamp(min=1)
        else:
            alike = self._table(evidence)
        alike = alike.clamp(0, 1)
        return alike * other + (1 - alike) * (outside + inside)

    def _table(self, evidence: CacheEvidence) -> Tensor:
        table = self.redundancy or ()
        if len(table) != evidence.depth or any(len(row) != evidence.kv_heads for row in table):
            raise ValueError(
                f"redundancy is a table of {evidence.depth} layers with {evidence.kv_heads} KV heads each; this one is "
                f"of another model"
            )
        row = torch.tensor(table[evidence.layer], dtype=torch.float32, device=evidence.keys.device)
        return row.repeat(evidence.batch).unsqueeze(1)


def _mean(values: Tensor, among: Tensor) -> Tensor:
    return values.masked_fill(~among, 0.0).sum(1, keepdim=True) / among.sum(1, keepdim=True).clamp(min=1)


def _scaled(values: Tensor, among: Tensor, level: Tensor) -> Tensor:
    """``values`` mapped to [0, 1] over the slots ``among``, and then to the mean ``level``; 0 elsewhere."""
    least = values.masked_fill(~among, float("inf")).amin(1, keepdim=True)
    most = values.masked_fill(~among, float("-inf")).amax(1, keepdim=True)
    out = ((values - least) / (most - least + _EPS)).masked_fill(~among, 0.0)
    return out * level / (_mean(out, among) + _EPS)
