"""FrameFusion (arXiv 2501.01986): merge tokens that look like the one before them in time, then prune by attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, unit
from tokenreduce.algorithms.sequence import best, keep_mixed, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import Evidence, LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["FrameFusion"]


@dataclass(frozen=True)
class FrameFusion(
    Reducer, name="framefusion", stage="language", needs=("attention", "frames", "history", "middle"),
    paper="2501.01986", title="FrameFusion",
):  # fmt: skip
    """FrameFusion: from layer 0 on, merge along time while tokens are alike; then one prune reaches the budget.

    In each call every visual token is compared (cosine of hidden states) with the token before it in time at the same
    place of the frame, among those that are left. Those at ``similarity_lower_bound`` or above are candidates; a run of
    them collapses into the token before the run, as the plain mean of all of them (sizes do not count, as published).
    Each call merges all candidates while they are less than the budget still asks for; where they are enough, it merges
    only the most similar and all is done. When candidates are fewer than ``ratio_lower_bound`` of the tokens, merging
    has ended, and the next call prunes by the attention of the last ``queries`` tokens, averaged over heads.

    The state of a generation is read off the number of visual tokens before each layer (``evidence.history``).

    Args:
        cost: mean of visual tokens over the layers that is aimed at, as a share of those at the entry. As published
            the call before layer 0 counts like a layer.
        keep: instead of ``cost``: visual tokens that are left in the end, a count or a ratio.
        similarity_lower_bound: cosine from which a token is a candidate.
        ratio_lower_bound: share of candidates below which merging has ended.
        queries: last tokens of the prompt whose attention ranks; 1, and 4 for Qwen2-VL in the published code.

    Decisions: the calls are before layer 0 and between attention and MLP of all layers but the last, where one would
    save nothing. The number of layers is the model's (28 in the published code). A token of a picture, or without known
    frame, has none before it. A budget that earlier layers have used up already leaves one token (an error in the
    published code). With ``keep``, the last call prunes what merging has left over. Ties go to the lower index; zero
    vectors have similarity 0.

    Raises ``ValueError`` for settings outside these ranges.
    """

    cost: float = 0.3
    keep: int | float | None = None
    similarity_lower_bound: float = 0.6
    ratio_lower_bound: float = 0.1
    queries: int = 1

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.queries, "queries", 1)
        for name, low in (("cost", 0.0), ("similarity_lower_bound", -1.0), ("ratio_lower_bound", 0.0)):
            value = getattr(self, name)
            inside = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= 1
            if not inside or (name == "cost" and value == 0):
                raise ValueError(f"{name} is a number in {'(0' if name == 'cost' else f'[{low:g}'}, 1], not {value!r}")

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        stay, joined = torch.ones_like(visual), []
        wanted = None if self.keep is None else visual_counts(self.keep, _entry(evidence))[1].flatten().tolist()
        counts = _history(evidence).tolist()
        for b in range(evidence.batch):
            phase, ratio = self._state(counts[b], None if wanted is None else wanted[b], evidence.depth)
            if wanted is not None and phase == "merge" and evidence.layer == evidence.depth - 1:
                phase = "prune"
            joined.append(_nothing(evidence))
            if phase == "merge" and ratio > 0:
                gone, joined[-1] = self._merge(evidence, b, ratio)
                stay[b, gone] = False
            elif phase == "prune" and ratio > 0:
                n = int(visual[b].sum())
                left = max(round(n * (1 - ratio)), 1) if wanted is None else wanted[b]
                stay[b] = ~visual[b] | self._attended(evidence, b, left)
        return Identity.like(evidence.x) if bool(stay.all()) else keep_mixed(stay, joined, evidence)

    def _state(self, counts: list[int], wanted: int | None, depth: int) -> tuple[str, float]:
        """What the call is to do, "merge", "prune" or nothing ("done"), and the share of tokens that still has to go;
        ``counts`` are the visual tokens before this call and before each earlier one."""
        phase = "merge"
        for m, (n, after) in enumerate(itertools.pairwise(counts)):
            ratio = self._ratio(counts[: m + 1], wanted, depth)
            if phase == "prune" or n - after >= int(ratio * n + 1e-9):
                return "done", 0.0
            phase = "prune" if n - after < self.ratio_lower_bound * n else "merge"
        return phase, self._ratio(counts, wanted, depth)

    def _ratio(self, counts: list[int], wanted: int | None, depth: int) -> float:
        n, m = counts[-1], len(counts) - 1
        if n == 0:
            return 0.0
        if wanted is not None:
            return max(1 - wanted / n, 0.0)
        left = n / counts[0]
        used = sum(c / counts[0] for c in counts[1:])
        return min(max(1 - (depth * self.cost - used) / ((depth - m) * left), 0.0), 1.0)

    def _merge(
        self, evidence: LanguageEvidence, b: int, ratio: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Tokens (R,) that go, and where they join; see :func:`tokenreduce.algorithms.sequence.keep_mixed`."""
        film = evidence.frame_of[b]
        where = (visual_of(evidence)[b] & (film[:, 0] >= 0)).nonzero().flatten()
        if not len(where):
            return where, _nothing(evidence)
        for column in (1, 3, 0):  # by video, place in the frame, and time
            where = where[film[where, column].argsort(stable=True)]
        x = unit(evidence.x[b, where].detach())
        finite(x.sum(1)[None], evidence)
        same = (film[where[1:]][:, [0, 3]] == film[where[:-1]][:, [0, 3]]).all(1)
        alike = torch.where(same, (x[1:] * x[:-1]).sum(1), -2.0)
        alike = torch.cat([alike.new_full((1,), -2.0), alike])
        joins = alike >= self.similarity_lower_bound
        n = int(visual_of(evidence)[b].sum())
        most = int(ratio * n + 1e-9)
        if int(joins.sum()) > most or int(joins.sum()) >= ratio * n:
            first = torch.zeros_like(joins).index_fill(0, descending(alike[None])[0, :most], True)
            joins = joins & first
        head = where[~joins][(~joins).long().cumsum(0) - 1]
        src, into = where[joins], head[joins]
        share = 1 / (1 + torch.bincount(into, minlength=evidence.n).float())
        return src, (src, into, share[into], share)

    def _attended(self, evidence: LanguageEvidence, b: int, left: int) -> Tensor:
        """(N,) bool of the ``left`` visual tokens that the last ones attend to most."""
        back = torch.arange(self.queries, device=evidence.x.device)
        rows = (evidence.last() - back).clamp(min=0)
        scores = finite(evidence.attention(rows)[b].mean((0, 1))[None], evidence)
        return best(scores, visual_of(evidence)[b : b + 1], torch.tensor([[left]], device=scores.device))[0]


def _nothing(evidence: LanguageEvidence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.long, device=evidence.x.device)
    return none, none, none.float(), torch.ones(evidence.n, device=evidence.x.device)


def _entry(evidence: LanguageEvidence) -> LanguageEvidence:
    """LanguageEvidence that has the visual tokens of the prompt's entry, for counting."""
    prompt = evidence.prompt
    return evidence if prompt is None else Evidence(evidence.x, visual=prompt.visual)


def _history(evidence: LanguageEvidence) -> Tensor:
    """(B,m+1) visual tokens before every call; nothing has been merged where nobody counted."""
    if evidence.history is not None:
        return evidence.history
    now = visual_of(evidence).sum(1, keepdim=True)
    return now.expand(-1, 1 + min(evidence.layer, 1))
