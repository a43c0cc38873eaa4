"""RazorAttention (arXiv 2407.15891): heads that look far back keep all, the others ends and a mean of the middle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.head_table import Head, HeadTable, Headwise
from tokenreduce.algorithms.keys import budget, candidates
from tokenreduce.algorithms.sequence import packed
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, Prune

__all__ = ["RazorAttention"]


@dataclass(frozen=True)
class RazorAttention(Headwise, name="razorattention", paper="2407.15891", title="RazorAttention"):
    """RazorAttention: behind the prompt, heads that retrieve keep everything, the others first, last and one mean.

    In a head that does not retrieve, of the keys that ``what`` counts the first ``N0`` and the last ``max(S0, N/C)`` of
    N stay. The rest becomes one compensation token, the mean of its keys and of its values, which counts in later
    attention as often as it has members: its logit gets the log of their number. Which heads retrieve says the table:
    of all KV heads of all layers, the ``induction`` share with the largest induction score and the ``echo`` share with
    the largest echo score, ties at the border included.

    Args:
        table, heads, what: see :class:`~tokenreduce.algorithms.head_table.Headwise`. With ``what="visual"``, first and
            last are counted among the visual keys.
        keep: instead of ``S0`` and ``C``: keys that such a head keeps of those that ``what`` counts, a count or a
            ratio, the first ``N0`` of them included; the compensation token stands beside them.
        S0: least number of last keys; 4000 as published, so that prompts of one image are left alone.
        C: the last ``N/C`` keys stay where that is more, rounded down; 5 as published.
        N0: first keys that stay.
        induction, echo: shares of all KV heads that retrieve, rounded to the nearest number, half to even.
        count_bias: whether the compensation token counts by its members. False lets it enter attention as one key, as
            Huawei's code does, which also keeps 4 + 1 + 251 keys whatever the length.

    Keys are averaged as they are cached, rotated, also where positions have several axes: the mean over a whole context
    is what the method means. While decoding nothing leaves, and the window of last keys does not move, as in the code
    (the paper does not say). Heads of ALiBi models are chosen by their reach in the paper, which is not measured here;
    give ``heads`` for them.

    Raises ``ValueError`` for settings out of range, without a table, and for the table of another model.
    """

    keep: int | float | None = None
    S0: int = 4000
    C: float = 5.0
    N0: int = 4
    induction: float = 0.14
    echo: float = 0.01
    count_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_count(self.S0, "S0", 1)
        check_count(self.N0, "N0")
        if self.C < 1:
            raise ValueError(f"C divides the length of the prompt, a number >= 1, not {self.C!r}")
        for name in ("induction", "echo"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the heads in [0, 1], not {getattr(self, name)!r}")

    def choose(self, table: HeadTable) -> Iterable[Head]:
        for name in ("induction", "echo"):
            ranked = table.ranked(name)
            count = round(getattr(self, name) * len(ranked))
            if count:
                yield from (head for score, head in ranked if score >= ranked[count - 1][0])

    def merges_keys(self, evidence: CacheEvidence) -> bool:
        return True

    def counts_merged(self) -> bool:
        return self.count_bias

    def plan(self, evidence: CacheEvidence) -> Plan:
        among, whole = candidates(evidence, self.what), self.whole(evidence)
        present = among.sum(1, keepdim=True)
        if self.keep is None:
            last = (present / self.C).long().clamp(min=self.S0)
        else:
            last = budget(self.keep, among) - self.N0
            if bool((~whole & (last < 0) & (present > last + self.N0)).any()):
                raise ValueError(
                    f"the budget of {int((last + self.N0).min())} keys is below N0={self.N0}, which always stay; give "
                    f"a larger keep, or a smaller N0"
                )
        order = among.long().cumsum(1)
        gone = among & (order > self.N0) & (order <= present - last) & ~whole
        return _compensated(gone, evidence)


def _compensated(gone: Tensor, evidence: CacheEvidence) -> Plan:
    """The plan that makes one token of all in ``gone`` (B*Hkv,N), in the place of the first of them, and keeps the
    rest."""
    if not bool(gone.any()):
        return Identity.like(evidence.keys)
    host = gone & (gone.long().cumsum(1) == 1)
    kept = Prune.from_mask((evidence.there & ~gone) | host)
    src, real = packed(gone & ~host)
    place = host.gather(1, kept.keep)
    if kept.valid is not None:
        place = place & kept.valid
    dst = place.long().argmax(1, keepdim=True).expand_as(src)
    # Heads with fewer to merge are filled up with a token that stays, of weight 0 and without size: nothing changes.
    src = torch.where(real, src, (~gone).long().argmax(1, keepdim=True))
    return Merge(
        evidence.n, kept.keep, src, dst, weights=gone.float(), size_scale=real.float(), valid=kept.valid, by_size=True
    )
