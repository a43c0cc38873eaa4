"""AIM, pruning (arXiv 2412.03248): fewer visual tokens in every layer of a span, by PageRank over attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import inner
from tokenreduce.algorithms.sequence import keep_best, shrink, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import Attention, LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["AIM"]


@dataclass(frozen=True)
class AIM(Reducer, name="aim", stage="language", needs=("attention",), paper="2412.03248", title="AIM, pruning"):
    """AIM inside the language model: from layer ``l1`` to ``l2``, each layer's attention drops as many visual tokens.

    The attention logits of a layer (all heads, all tokens that are left, causal) become a sharper map M per head by a
    float32 softmax at temperature ``tau_imp``. A uniform vector p over the sample's tokens is multiplied by it
    ``iters`` times, p M; the importance of a token is the root of the mean over heads of p squared. Layer l is read
    and the layer behind it is the first with fewer tokens.

    Without ``keep``, ``l2 - l1 + 1`` equal steps lead to no visual tokens: in 28 layers 14 to 21 are read and leave
    0.875, 0.75, ... 0 (rounded down) of those at the entry of the language model. With ``keep`` the steps are as
    equal and end there. Its counterpart before the language model is ``aim-merge``.

    Cost: the iteration needs the whole N x N map of every head by definition. It is computed for one head after the
    other, rows in chunks, so that one map (4 N^2 bytes per sample) is the most that is held.

    Args:
        keep: visual tokens left behind the last step, a count or a ratio of those at the entry; None for none at all.
        l1, l2: 0-based first and last layer whose attention is read; half and three quarters of the depth by default
            (14 and 21 of 28; the authors take 13 and 20 of Vicuna's 32), at most the last layer but one.
        tau_imp: temperature.
        iters: multiplications.
        d: share of p that is spread evenly over the tokens again in each of them (teleport).

    Decisions: tokens that are gone or padding take no part at all (in the published code, which masks tokens instead
    of dropping them, they still enter the first multiplication, and padding makes scores NaN); every sample counts
    its own text; a visual token at the very end of a prompt stays, since generation goes on from it; kept tokens keep
    their positions, as published; no choice is made in decoding.

    Raises ``ValueError`` for settings outside these ranges, for layers that the model does not have, or attention
    given to :class:`~tokenreduce.core.evidence.LanguageEvidence` that is not the whole map.
    """

    keep: int | float | None = None
    l1: int | None = None
    l2: int | None = None
    tau_imp: float = 0.1
    iters: int = 5
    d: float = 0.0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("l1", "l2"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if self.l1 is not None and self.l2 is not None and self.l1 > self.l2:
            raise ValueError(f"l1 is at most l2, not l1={self.l1} and l2={self.l2}")
        if isinstance(self.tau_imp, bool) or not isinstance(self.tau_imp, int | float) or not 0 < self.tau_imp < 1e6:
            raise ValueError(f"tau_imp is a temperature > 0, not {self.tau_imp!r}")
        check_count(self.iters, "iters", 1)
        if isinstance(self.d, bool) or not isinstance(self.d, int | float) or not 0 <= self.d < 1:
            raise ValueError(f"d is a share in [0, 1), not {self.d!r}")

    def _span(self, depth: int) -> tuple[int, int]:
        last = min(3 * depth // 4, depth - 2) if self.l2 is None else self.l2
        first = min(depth // 2, last) if self.l1 is None else self.l1
        if not 0 <= first <= last <= depth - 2:
            raise ValueError(
                f"l1={self.l1}, l2={self.l2}: layers {first} to {last} would be read, but the language model has "
                f"layers 0 to {depth - 1} and the last one drops nothing; give 0 <= l1 <= l2 <= {depth - 2}"
            )
        return first, last

    def acts_at(self, layer: int, depth: int) -> bool:
        first, last = self._span(depth)
        return first < layer <= last + 1

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual, entry = visual_of(evidence), evidence.visual_entry()
        (first, last), end = self._span(evidence.depth), evidence.last()
        left = torch.zeros_like(entry) if self.keep is None else shrink(self.keep, entry, 0, 1)
        steps = last - first + 1
        wanted = left + (entry - left) * (last + 1 - evidence.layer) // steps
        wanted = wanted.maximum(visual.gather(1, end).long())
        if bool((wanted >= visual.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.x)
        scores = _page_rank(evidence, self.tau_imp, self.iters, self.d)
        return keep_best(scores.scatter(1, end, float("inf")), wanted, evidence)


def _page_rank(evidence: LanguageEvidence, temperature: float, iters: int, teleport: float) -> Tensor:
    """(B,N) float32 importance."""
    there = torch.ones_like(evidence.x[..., 0], dtype=torch.bool) if evidence.valid is None else evidence.valid
    start = there.float() / there.sum(1, keepdim=True)
    ends = []
    for h in range(evidence.attention.heads):
        m = _sharper(evidence.attention.head(h), evidence, temperature).transpose(1, 2)
        p = start
        for _ in range(iters):
            p = (1 - teleport) * inner(p.unsqueeze(1), m)[:, 0] + teleport * start
        ends.append(p)
    ranks = torch.stack(ends, 1)
    # Relative to the largest, since squares of small ranks would be 0 and tie.
    largest = ranks.amax(1, keepdim=True).clamp(min=torch.finfo(ranks.dtype).tiny)
    return (ranks / largest).square().mean(1).sqrt() * largest[:, 0]


def _sharper(one: Attention, evidence: LanguageEvidence, temperature: float, chunk: int = 256) -> Tensor:
    """(B,N,N) attention map of the only head of ``one`` at ``temperature``; rows of padding are 0."""
    n, device = evidence.n, evidence.x.device
    hot, out = one.tempered(temperature), evidence.x.new_zeros(evidence.batch, n, n, dtype=torch.float32)
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        where, seen = torch.arange(start, end, device=device), n
        if hot is not None:
            seen = end if hot.causal and hot.mask is None else n
            rows = (hot if seen == n else hot.first(seen))(where)[:, 0]
        else:
            rows = one(where)[:, 0]
            if one.given is not None:
                if rows.shape[1] != n:
                    raise ValueError(
                        f"aim needs attention of all {n} rows, not {rows.shape[1]}: leave it out or give all"
                    )
                rows = rows[:, where]
            # Logits are known up to a constant per row, which no softmax sees.
            rows = (rows.log() / temperature).softmax(-1)
        out[:, start:end, :seen] = rows if one.valid is None else rows.masked_fill(~one.valid[:, where, None], 0.0)
    return out
