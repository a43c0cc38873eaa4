"""A2SF (arXiv 2407.20485): attention adds up and is forgotten, so that old keys have no head start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.decode_scorer import HeavyHitters
from tokenreduce.algorithms.keys import check_rows
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["A2SF"]

#: Rows whose weight is below this are left out; a float32 sum of weights does not show them.
_SMALL = 2.0**-40


@dataclass(frozen=True)
class A2SF(HeavyHitters, name="a2sf", needs=("attention",), paper="2407.20485", title="A2SF"):
    """A2SF: as H2O, with a forgetting factor on the attention of earlier queries.

    A key's score is its softmaxed attention, summed over the query heads of its KV head and over the queries, each
    times ``forgetting_factor`` to the power of the real tokens behind it; in decode the score is multiplied by it and
    the new row added. Under a causal mask early keys are seen by more queries than late ones; with forgetting, all keys
    older than about 1 / (1 - factor) tokens have had as many. 1 is H2O, 0 looks at the last query only. Of the prompt,
    only as many last queries are computed as count for anything.

    With ``what="all"`` the window and the cut in decode are those of :class:`~tokenreduce.vision.cache.h2o.H2O`; with
    ``what="visual"`` the whole budget goes to visual keys and nothing goes while decoding.

    Args:
        forgetting_factor: in [0, 1]. Published values differ much: 0.2 in the authors' first code (the last three or
            four queries, nearly TOVA), 0.95 in their current one (about twenty), which is the default. Set it.
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`.
        interval: decode steps from one cut to the next, 1 in the first code; None cuts behind the prompt only, as the
            current one does: ``keep=256,what=all,recent_size=16,interval=none`` is its example.
        recent_share, recent_size, hh_size, heavy_ratio, recent_ratio: see :class:`~tokenreduce.vision.cache.h2o.H2O`.

    The controller that the authors' repository trained later is no part of the method.

    Raises ``ValueError`` for values other than these, sizes or ratios with ``what="visual"``, one of a pair
    alone, both pairs, and in a forward for a budget below ``recent_size`` and prompts that are padded behind.
    """

    forgetting_factor: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.forgetting_factor <= 1:
            raise ValueError(f"forgetting_factor is a number in [0, 1], not {self.forgetting_factor!r}")

    def query_rows(self) -> int | None:
        if self.forgetting_factor == 1:
            return None
        if self.forgetting_factor == 0:
            return 1
        return 1 + math.ceil(math.log(_SMALL) / math.log(self.forgetting_factor))

    def gained(self, evidence: CacheEvidence) -> Tensor:
        rows = self.query_rows()
        if rows is not None:
            check_rows(evidence, rows)
        real = evidence.row_there(rows).long()
        behind = real.flip(1).cumsum(1).flip(1) - real
        weights = torch.pow(self.forgetting_factor, behind.double()).float()  # 0 ** 0 is 1
        return evidence.column_sums(weights, rows).sum(1)

    def faded(self, scores: Tensor, evidence: CacheEvidence) -> Tensor:
        since = evidence.row_there().sum(1, keepdim=True)
        return scores * torch.pow(self.forgetting_factor, since.double()).float()
