"""FiCoCo-L (arXiv 2411.17686): in every layer, redundant visual tokens are split over those that correlate with
them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite
from tokenreduce.algorithms.sequence import keep_mixed, packed, question, rows_of, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_either
from tokenreduce.core.evidence import Evidence, LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FiCoCoL"]

TEXTS = ("rows", "tv")
_START = 5


@dataclass(frozen=True)
class FiCoCoL(
    Reducer, name="ficoco", stage="language", needs=("attention", "middle"), paper="2411.17686", title="FiCoCo-L"
):
    """FiCoCo inside the language model: filter, correlate, compress, between attention and MLP of the layers.

    A is the layer's attention, mean over heads; v are the visual tokens, t the text behind them. Filter: the ``r``
    visual tokens with the largest g * sum_v A - (1 - g) * mean_t A go. Correlate: a * A_vv + (1 - a) * A_vt A_tv says
    how a token that goes relates to the visual ones (itself excepted); its targets are the best of them, as many as, at
    most over the tokens that go, lie above the ``quantile`` of their row. Compress: each target gets the token times
    its share of the softmax over the row, shares of a token's targets summing to 1. As in the official code nothing is
    divided by sizes, so that targets grow, and what goes to a target that goes itself is lost. Kept tokens keep order
    and original positions (the code renumbers them).

    In the official code a visual query looks for text in its own row, where a causal mask has none, so that both
    second terms are 0; ``text="tv"`` takes the attention that text pays to the token instead, as the paper seems to
    mean. There the visual block is all up to the image's end, and its first token is protected; here the block are the
    visual tokens, and ``protect_first`` is about the first of them.

    Args:
        r: visual tokens that every layer removes, from ``start`` on; 42.
        keep: instead of ``r``, visual tokens left behind the last layer, a count or a ratio of those at the entry,
            reached by equal steps.
        start: 0-based first layer in which tokens go; None is 5, or the middle of a model that is not deeper than 10
            layers. The last layer removes nothing, which would save nothing.
        g, a: weights of filter and correlation, in [0, 1].
        quantile: of a row, from which targets count, in [0, 1].
        text: "rows" as in the code or "tv".
        protect_first: whether the first visual token always stays.

    Decisions: ties go to the lower index, also among those that go; ``r`` leaves at least one token; every token that
    goes has a target; ranks are float32.

    Raises ``ValueError`` for other values, both ``r`` and ``keep``, and a ``start`` that the model does not have.
    """

    r: int | None = None
    keep: int | float | None = None
    start: int | None = None
    g: float = 0.6
    a: float = 0.6
    quantile: float = 0.998
    text: str = "rows"
    protect_first: bool = True

    def __post_init__(self) -> None:
        if self.r is not None:
            check_count(self.r, "r", 1)
        check_either(self.keep, self.r is not None)
        if self.start is not None:
            check_count(self.start, "start")
        for name in ("g", "a", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a number in [0, 1], not {getattr(self, name)!r}")
        if self.text not in TEXTS:
            raise ValueError(f"text is one of {TEXTS}, not {self.text!r}")

    def _start(self, depth: int) -> int:
        start = (_START if depth > 2 * _START else depth // 2) if self.start is None else self.start
        if start >= max(depth - 1, 1):
            raise ValueError(
                f"start={start}: tokens go in layers 0 to {depth - 2} of this language model, not in its last one"
            )
        return start

    def acts_at(self, layer: int, depth: int) -> bool:
        everything = isinstance(self.keep, float) and self.keep == 1.0
        return layer > self._start(depth) and not everything

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual, start = visual_of(evidence), self._start(evidence.depth)
        counts = visual.sum(1)
        if self.keep is None:
            left = (counts - (42 if self.r is None else self.r)).clamp(min=1)
        else:
            prompt = evidence.prompt
            entry = evidence if prompt is None else Evidence(evidence.x, visual=prompt.visual)
            first, last = visual_counts(self.keep, entry)
            step, steps = evidence.layer - start, max(evidence.depth - 1 - start, 1)
            left = (first - (first - last) * step // steps)[:, 0].clamp(min=1)
        gone = (counts - left).clamp(min=0)
        if not bool((gone > 0).any()):
            return Identity.like(evidence.x)
        stay, joined = torch.ones_like(visual), []
        score, rows_tv = self._filter(evidence)
        for b, r in enumerate(gone.tolist()):
            where = visual[b].nonzero().flatten()
            s = score[b, where]
            if self.protect_first and len(s):
                s = s.index_fill(0, torch.zeros(1, dtype=torch.long, device=s.device), float("-inf"))
            lost = where[descending(s[None])[0, :r]]
            stay[b, lost] = False
            joined.append(self._compress(evidence, b, lost, where, rows_tv))
        return keep_mixed(stay, joined, evidence)

    def _filter(self, evidence: LanguageEvidence) -> tuple[Tensor, Tensor]:
        """(B,N) redundancy of the visual tokens, and (B,T,N) what the text behind pays."""
        visual = visual_of(evidence)
        text = question(visual, evidence.valid)
        number = text.sum(1, keepdim=True).clamp(min=1)
        index, there = packed(visual)
        own, cross = torch.zeros(visual.shape, device=visual.device), torch.zeros(visual.shape, device=visual.device)
        for part, real in zip(index.split(64, 1), there.split(64, 1), strict=True):
            rows = rows_of(evidence, part).mean(1).masked_fill(~real.unsqueeze(-1), 0.0)
            own = own.scatter_add(1, part, (rows * visual.unsqueeze(1)).sum(2))
            cross = cross.scatter_add(1, part, (rows * text.unsqueeze(1)).sum(2))
        asked, real = packed(text)
        said = rows_of(evidence, asked).mean(1).masked_fill(~real.unsqueeze(-1), 0.0)
        if self.text == "tv":
            cross = said.sum(1)
        score = self.g * own - (1 - self.g) * cross / number
        return finite(score.masked_fill(~visual, 0.0), evidence), said

    def _compress(
        self, evidence: LanguageEvidence, b: int, lost: Tensor, where: Tensor, said: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the tokens ``lost`` (R,) give to others of the visual ``where`` (n,) of one sample."""
        own = torch.ones(evidence.n, device=where.device)
        if not len(lost) or len(where) < 2:
            return lost[:0], lost[:0], own[:0], own
        one = torch.tensor([b], device=where.device)
        alone = Evidence(evidence.x[b : b + 1], visual=visual_of(evidence)[b : b + 1])
        alone._attention = evidence.attention.samples(one)
        rows = torch.cat([rows_of(alone, part[None])[0].mean(0) for part in lost.split(64)])
        text = question(visual_of(evidence)[b : b + 1], None if evidence.valid is None else evidence.valid[b : b + 1])
        said = said[b, : int(text.sum())]
        to_text = rows[:, text[0]] if self.text == "rows" else said[:, lost].T
        related = self.a * rows[:, where] + (1 - self.a) * to_text @ said[:, where]
        related = related.masked_fill(lost[:, None] == where, float("-inf"))
        bound = _quantile(related, self.quantile)
        most = max(int((related > bound).sum(1).max()), 1)
        shares = related.softmax(1)
        best = descending(shares)[:, : min(most, len(where) - 1)]
        part = shares.gather(1, best)
        part = part / part.sum(1, keepdim=True)
        src, into = lost[:, None].expand_as(best).flatten(), where[best].flatten()
        stays = ~torch.isin(into, lost)
        return src[stays], into[stays], part.flatten()[stays], own


def _quantile(x: Tensor, share: float) -> Tensor:
    """(R,1) linear quantile of every row of ``x`` (R,n), of any size."""
    ordered, at = x.sort(1).values, share * (x.shape[1] - 1)
    low, high = ordered[:, int(at)], ordered[:, min(int(at) + 1, x.shape[1] - 1)]
    mixed = torch.where(low == float("-inf"), low, low + (at - int(at)) * (high - low))
    return mixed.unsqueeze(1)
