"""Expected Attention (arXiv 2510.00636): the attention that keys can expect of queries that are still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True)
class ExpectedAttention(
    KeyScorer, name="expected-attention", needs=("attention", "rotary"), paper="2510.00636", title="Expected Attention"
):
    """Expected Attention: behind each layer's prefill, keep the keys that coming queries will attend to most, in every
    KV head by itself.

    Coming queries are taken to be Gaussian: with mean m and covariance S of the prompt's queries before their rotation,
    turned by the mean rotation of the next ``n_future_positions``. The expected exponential of the logit of key k is
    exp(m.k/sqrt(d) + k'Sk/(2d)); this is made a softmax over the keys, averaged over the query heads of the KV head,
    and multiplied by the norm of the value. Sinks take no part in any of it and stay. Queries are taken back from the
    rotated ones by the model's own tables, so that images with positions of several axes (M-RoPE), tables that cover
    part of the channels, and scaled ones are right; the next positions are those of text.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`. Nothing recent is protected.
        n_future_positions: how far ahead is looked.
        n_sink: first tokens that stay, inside the budget.
        use_covariance: whether the second term is there; the expensive part.
        use_vnorm: whether norms of values count.
        epsilon: added to the softmax before the norm counts; the paper has 0.02 below Ada-KV.
        statistics: "all" queries of the prompt make mean and covariance, as published, or those of "text" alone, since
            what comes is text (not in the paper).

    Where a cache holds more than the queries given (a later turn), statistics are of those that are given. Decided once
    behind the prompt; the authors' repository also does it every so many decode steps.

    Raises ``ValueError`` for values other than these, evidence without queries or rotary tables, a budget below the
    sinks, and a prompt without a query of the kind that is asked for.
    """

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0
    statistics: Literal["all", "text"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.n_future_positions, "n_future_positions", 1)
        check_count(self.n_sink, "n_sink")
        if self.epsilon < 0:
            raise ValueError(f"epsilon is a number >= 0, not {self.epsilon!r}")

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.first(self.n_sink) if self.n_sink else None

    def importance(self, evidence: CacheEvidence) -> Tensor:
        counted = evidence.there & ~evidence.first(self.n_sink)
        mean, spread = self._ahead(evidence, counted)
        keys = evidence.keys.float()
        total = torch.zeros(keys.shape[:2], device=keys.device)
        for g in range(evidence.groups):  # one query head at a time: k'S is as large as the keys
            logits = (keys @ mean[:, g].unsqueeze(-1)).squeeze(-1) * evidence.scale
            if spread is not None:
                logits = logits + ((keys @ spread[:, g]) * keys).sum(-1) * (evidence.scale**2 / 2)
            total = total + logits.masked_fill(~counted, float("-inf")).softmax(-1).masked_fill(~counted, 0.0)
        scores = total / evidence.groups
        if self.use_vnorm:
            scores = (scores + self.epsilon) * evidence.values.float().norm(dim=-1)
        return scores.masked_fill(~counted, 0.0)

    def _ahead(self, evidence: CacheEvidence, counted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B*Hkv,G,d) and covariance (B*Hkv,G,d,d) of the queries to come."""
        rotary, rows = evidence.rotary, evidence.rows_given
        queries = evidence.queries.float()
        if self.statistics == "text":
            counted = counted & ~evidence.visual
        used = counted[:, evidence.n - rows :]
        number = used.sum(1).view(-1, 1, 1, 1)
        if bool(((number == 0).flatten() & (evidence.counts > self.n_sink).flatten()).any()):
            raise ValueError(
                f"no query behind the first {self.n_sink} tokens to learn from (statistics={self.statistics!r}); give "
                "a smaller n_sink, or statistics=all"
            )
        cos, sin = (_of_rows(t[:, evidence.n - rows :], evidence)[:, None] for t in (rotary.cos, rotary.sin))
        power = (cos.square() + sin.square()).clamp(min=torch.finfo(torch.float32).tiny)  # not 1 where tables scale
        plain = _turn(queries, cos / power, -sin / power, rotary.paired).masked_fill(~used[:, None, :, None], 0.0)
        mean = plain.sum(2, keepdim=True) / number.clamp(min=1)
        tables = rotary.ahead(self.n_future_positions)
        cos, sin = (_of_rows(t, evidence).mean(1)[:, None, None] for t in tables)
        turned = _turn(mean, cos, sin, rotary.paired).squeeze(2)
        if not self.use_covariance:
            return turned, None
        apart = (plain - mean).masked_fill(~used[:, None, :, None], 0.0)
        spread = apart.transpose(-1, -2) @ apart / number.clamp(min=1)
        half = _turn(spread, cos, sin, rotary.paired)
        return turned, _turn(half.transpose(-1, -2), cos, sin, rotary.paired)


def _of_rows(table: Tensor, evidence: CacheEvidence) -> Tensor:
    """(B*Hkv,...) float32 of a rotary table (B or 1,...)."""
    batch = evidence.batch if table.shape[0] == 1 else table.shape[0]
    return evidence.fold(table.float().expand(batch, -1, -1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    """``x`` (...,d) with its first r channels turned by tables (...,r)."""
    r = cos.shape[-1]
    part, rest = x[..., :r], x[..., r:]
    if paired:
        other = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-part[..., r // 2 :], part[..., : r // 2]], -1)
    return torch.cat([part * cos + other * sin, rest], -1)
