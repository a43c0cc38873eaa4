"""MEDA (arXiv 2502.17599): layers where image and text attend diffusely keep more; the rest is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_merge import check_merge, merge_slots, text_first
from tokenreduce.algorithms.keys import candidates, check_finite, check_what
from tokenreduce.algorithms.sequence import best, packed
from tokenreduce.core.budget import check_keep, check_share
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["MEDA"]

#: Queries whose rows of logits are computed at once.
_BLOCK = 256
#: Smallest weight in the code's entropy.
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is kept of a layer: what its keys are worth, (B*Hkv,N), and its entropy, (B,) double."""

    evidence: CacheEvidence
    scores: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class MEDA(CacheReducer, name="meda", needs=("attention",), paper="2502.17599", title="MEDA"):
    """MEDA: behind the last layer's prefill, share one budget over the layers by the entropy of their attention.

    The entropy of a layer is that of text queries over visual keys only, plus that of visual queries over text keys
    only, neither with a causal mask, averaged over queries and query heads. The budget share r becomes
    softmax(entropy) L r in each of L layers, clamped to [0.01, 1] (what clamping cuts off is lost). A layer keeps the
    keys with most attention of all queries of the prompt, summed and averaged over the query heads of a KV head; every
    other pair is merged into the kept key of its head with the highest cosine, see
    :func:`~tokenreduce.algorithms.key_merge.merge_slots`. Nothing is evicted in decode; peak memory does not fall.

    Args:
        keep: budget r of all layers on average, a share or a count of keys of every head.
        what: "visual": all text stays, and the best visual keys, rounded half up. "all" as published: of the layer's
            share, ``recent_fraction`` are the last keys and the others the best, both rounded down.
        entropy: "cross" as above; "full" is the code's: of the whole causal rows, also of those within text.
        recent_fraction: with ``what="all"``, 0.75 in the paper and 0.5 in the code.
        text: with ``what="all"``: "keep" keeps all text, also beyond the budget, "budget" counts it inside, first.
        merge: "average", "pivot", "weighted" or "none".
        merge_keys: whether keys are merged like values; None for not where positions have several axes (M-RoPE).

    The paper is followed. The code cuts at the first decode step, counts that step's row in, and keeps as many last
    keys as the prompt has text. Evidence with rows of attention instead of queries only knows what queries see: text
    in front of an image then counts 0, and an image does not see text behind it. Samples without both kinds have no
    cross entropy, and share evenly.

    Raises ``ValueError`` for an unknown ``entropy``, ``merge`` or ``text``, and numbers out of range.
    """

    keep: int | float = 0.1
    what: str = "visual"
    entropy: str = "cross"
    recent_fraction: float = 0.75
    text: str = "keep"
    merge: str = "average"
    merge_keys: bool | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_merge(self.merge, self.text)
        check_share(self.recent_fraction, "recent_fraction")
        if self.entropy not in ("cross", "full"):
            raise ValueError(f"entropy={self.entropy!r}: choose 'cross' (the paper) or 'full' (the code)")

    def moment(self) -> str:
        return "prompt"

    def merges_keys(self, evidence: CacheEvidence) -> bool:
        return super().merges_keys(evidence) if self.merge_keys is None else self.merge_keys

    def summary(self, evidence: CacheEvidence) -> _Layer:
        scores = evidence.column_sums().mean(1)
        check_finite(scores, evidence.there)
        entropy = _full(evidence) if self.entropy == "full" else _cross(evidence)
        return _Layer(evidence.bare(), scores, entropy)

    def decide(self, summaries: Sequence[_Layer]) -> list[Plan]:
        shares = torch.stack([layer.entropy for layer in summaries]).softmax(0) * len(summaries)
        return [self._layer(layer, share) for layer, share in zip(summaries, shares, strict=True)]

    def _layer(self, layer: _Layer, share: Tensor) -> Plan:
        evidence = layer.evidence
        n = candidates(evidence, self.what).sum(1, keepdim=True).double()
        budget = self.keep / n.clamp(min=1) if isinstance(self.keep, int) else torch.full_like(n, self.keep)
        part = (evidence.fold(share.unsqueeze(1)) * budget).clamp(0.01, 1)
        visual = evidence.visual
        if self.what == "visual":
            stay = ~visual | best(layer.scores, visual, (part * n + 0.5).long().clamp(min=1))
        else:
            recent = (self.recent_fraction * part * n).long()
            important = ((1 - self.recent_fraction) * part * n).long()
            stay = text_first(layer.scores, evidence, important, recent, self.text)
            stay = stay | ~visual.any(1, keepdim=True) | (part >= 1)
        return merge_slots(stay | (budget >= 1), evidence, self.merge)


def _full(evidence: CacheEvidence) -> Tensor:
    """(B,) entropy of whole causal rows, averaged over rows and query heads."""
    there, total = evidence.there[:, None, None], torch.zeros(evidence.batch, dtype=torch.double)
    total = total.to(evidence.keys.device)
    rows = evidence.row_there()
    for start, block in evidence.blocks():
        block = block.clamp(min=_LEAST)
        real = there & rows[:, None, start : start + block.shape[2], None]
        bits = (block * block.log()).masked_fill(~real, 0.0).sum((2, 3), dtype=torch.double)
        total = total - evidence.unfold(bits).mean((1, 2))
    return total / evidence.unfold(rows)[:, 0].sum(1).clamp(min=1)


def _cross(evidence: CacheEvidence) -> Tensor:
    """(B,) entropies of text over vision and of vision over text, each averaged over its queries and query heads."""
    visual = evidence.visual
    known = evidence.rows_given
    if not known:
        evidence.rows()
    text, first = evidence.there & ~visual, evidence.n - known
    out = torch.zeros(evidence.batch, dtype=torch.double, device=visual.device)
    for asking, asked in ((text, visual), (visual, text)):
        asking = asking[:, first:]
        slots, there = packed(asked)
        number = evidence.unfold(asking)[:, 0].sum(1).clamp(min=1)
        for start in range(0, known, _BLOCK):
            stop = min(start + _BLOCK, known)
            mine = asking[:, start:stop]
            if not bool(mine.any()):
                continue
            logits = evidence.logits(start, stop, slots).masked_fill(~there[:, None, None], float("-inf"))
            logs = logits.log_softmax(-1).nan_to_num(-1e4)  # of a row that sees nothing, -inf less -inf
            bits = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1) * mine[:, None]
            out += evidence.unfold(bits.sum(2, dtype=torch.double)).mean((1, 2)) / number
    return out
