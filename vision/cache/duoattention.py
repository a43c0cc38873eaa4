"""DuoAttention (arXiv 2410.10819): retrieval heads keep everything, streaming heads the first and the last tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.head_table import Head, HeadTable, Headwise
from tokenreduce.algorithms.keys import budget, candidates, keep_slots
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["DuoAttention"]


@dataclass(frozen=True)
class DuoAttention(Headwise, name="duoattention", paper="2410.10819", title="DuoAttention"):
    """DuoAttention: streaming heads keep sinks and recent tokens, behind the prompt and while decoding.

    The table's score of a KV head says how much it looks far back. Heads at or above the ``sparsity`` quantile of all
    scores are retrieval heads, and keep everything. Streaming heads keep the first ``sink_size`` tokens and the last
    ``recent_size``, the newest included, and forget the others in every step.

    Args:
        table, heads, what: see :class:`~tokenreduce.algorithms.head_table.Headwise`. With ``what="visual"``, text
            outside of sinks and recent tokens stays, too.
        keep: instead of both sizes: keys that a streaming head keeps of those that ``what`` counts, a count or a ratio,
            a fifth of them first ones and the rest last ones, as the defaults are. Only the prompt is thinned then,
            since the share is one of the prompt.
        sparsity: share of the heads that stream; at 1 all do.
        threshold: instead of ``sparsity``: the score from which on a head retrieves; 0.5 is the gates' middle.
        sink_size, recent_size: of streaming heads; 64 and 256 in the code, 128 and 256 for its Llama 3.1 table.
        score_name: which scores of the table; by default "gate", the trained ones, where the table has them, and
            otherwise "on_the_fly".
        interval: decode steps between two evictions; None leaves what comes behind the prompt, as kvpress does.

    Gates are trained with the weights frozen, which is not done here: put published ones (a number for each layer and
    KV head) into the table as "gate". The on-the-fly score that ``tokenreduce heads`` measures is an approximation by
    kvpress. Of equal scores the lower head retrieves (the code adds noise); kvpress rounds the number of streaming
    heads instead of taking a quantile. The prompt itself runs on everything (the code lets its later chunks see
    sinks and recent tokens alone).

    Raises ``ValueError`` for settings out of range, without a table, and for the table of another model.
    """

    keep: int | float | None = None
    sparsity: float = 0.5
    threshold: float | None = None
    sink_size: int = 64
    recent_size: int = 256
    score_name: str | None = None
    interval: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_count(self.sink_size, "sink_size")
        check_count(self.recent_size, "recent_size", 1)
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is a share of the heads in [0, 1], not {self.sparsity!r}")
        if self.interval is not None:
            check_count(self.interval, "interval", 1)

    def choose(self, table: HeadTable) -> Iterable[Head]:
        name = self.score_name or ("gate" if "gate" in table.scores else "on_the_fly")
        ranked = table.ranked(name)
        if self.threshold is not None:
            return [head for score, head in ranked if score >= self.threshold]
        streaming = len(ranked) if self.sparsity == 1 else math.ceil((len(ranked) - 1) * self.sparsity - 1e-9)
        return [head for _, head in ranked[: len(ranked) - streaming]]

    def every(self) -> int:
        return self.interval if self.interval is not None and self.keep is None else 0

    def plan(self, evidence: CacheEvidence) -> Plan:
        among, whole = candidates(evidence, self.what), self.whole(evidence)
        if self.keep is None:
            inside = evidence.first(self.sink_size) | evidence.last(self.recent_size)
        else:
            total, present = budget(self.keep, among), among.sum(1, keepdim=True)
            sinks = torch.div(total, 5, rounding_mode="floor")
            order = among.long().cumsum(1)
            inside = (order <= sinks) | (order > present - (total - sinks))
        return keep_slots(whole | ~among | inside, evidence)
