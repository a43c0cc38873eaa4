"""STTM (arXiv 2507.07990), inside the language model: quadtrees and groups over time on its hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.quadtree import Forest, check_forest, merged
from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.sequence import keep_mixed, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["STTMLLM"]


@dataclass(frozen=True)
class STTMLLM(
    Reducer, name="sttm-llm", stage="language", needs=("frames", "places"), paper="2507.07990", title="STTM (LLM)"
):
    """STTM before a layer of the language model, where the official code merges; the steps are those of ``sttm``.

    Every video of a prompt is merged by itself; pictures are left alone, and so are frames that are no whole grid any
    more because tokens left before. Merged tokens keep the original position of the first token that they stand for
    (the code for LLaVA renumbers them; decoding goes on at the unreduced length in both).

    Args:
        layer: 0-based first layer that sees fewer tokens.
        keep: visual tokens that stay, a count or a ratio, rounded half up, or None for what the thresholds leave. It
            moves the thresholds as in ``sttm``, shared out among videos in proportion; where merging leaves too many,
            and among what is not merged, the last tokens that stand for the fewest go.
        theta_s, theta_t, root_level, border, components, weighted_avg, head_dim: as in ``sttm``.

    Raises ``ValueError`` for values other than these and a layer that the model does not have.
    """

    layer: int = 2
    keep: int | float | None = None
    theta_s: float = 0.85
    theta_t: float = 0.6
    root_level: int = 1
    border: str = "official"
    components: bool = False
    weighted_avg: bool = False
    head_dim: int | None = None

    def __post_init__(self) -> None:
        check_count(self.layer, "layer")
        check_keep(self.keep)
        check_forest(self.theta_s, self.theta_t, self.root_level, self.border, self.head_dim)

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        wanted = None
        if self.keep is not None:
            present, wanted = visual_counts(self.keep, evidence)
            if bool((wanted >= present).all()):
                return Identity.like(evidence.x)
        finite(evidence.x.detach().float().sum(-1).masked_fill(~visual, 0.0), evidence)
        stay, joined = ~visual, []
        for b in range(evidence.batch):
            head, weight = self._sample(evidence, b, None if wanted is None else int(wanted[b]))
            where = (visual[b] & (head >= 0)).nonzero().flatten()
            own = torch.ones(evidence.n, device=where.device)
            own[where] = weight[where]
            stay[b, head[where]] = True
            src = where[head[where] != where]
            joined.append((src, head[src], weight[src], own))
        return keep_mixed(stay, joined, evidence)

    def _sample(self, evidence: LanguageEvidence, b: int, keep: int | None) -> tuple[Tensor, Tensor]:
        """(N,) the column that every visual one of a sample is built into, -1 for none, and its weight there."""
        visual = visual_of(evidence)[b]
        device = visual.device
        head = torch.arange(evidence.n, device=device)
        weight = torch.ones(evidence.n, device=device)
        films = [f for f in map(lambda n: self._film(evidence, b, n), self._numbers(evidence, b)) if f is not None]
        present = int(visual.sum())
        inside = sum(f.numel() for f in films)
        for columns in films:
            share = None
            if keep is not None:
                share = max(int((keep - (present - inside)) * columns.numel() / max(inside, 1)), 1)
                share = min(share, columns.numel())
            x = evidence.x[b, columns.flatten()].detach().view(*columns.shape, -1)
            forest = Forest.of(x, self.root_level, self.border, self.weighted_avg, self.head_dim)
            to, part = merged(forest, self.theta_s, self.theta_t, share, self.components)
            flat = columns.flatten()
            head[flat] = torch.where(to < 0, -1, flat[to.clamp(min=0)])
            weight[flat] = part
        if keep is not None:
            names, sizes = head[visual & (head >= 0)].unique(return_counts=True)
            if len(names) > keep:
                left = names[sizes.argsort(descending=True, stable=True)[:keep]]
                head = torch.where(torch.isin(head, left), head, -1)
            elif len(names) < keep:  # rounding left a few: tokens that would go, or merge, stay as they are
                lone = (visual & (head != torch.arange(evidence.n, device=device))).nonzero().flatten()
                lone = lone[: keep - len(names)]
                head[lone], weight[lone] = lone, 1.0
                weight = _renewed(head, weight, visual)
        return head, weight

    @staticmethod
    def _numbers(evidence: LanguageEvidence, b: int) -> list[int]:
        film = evidence.frame_of[b][visual_of(evidence)[b], 0]
        return [int(n) for n in film.unique().tolist() if n >= 0]

    @staticmethod
    def _film(evidence: LanguageEvidence, b: int, number: int) -> Tensor | None:
        """(T,H,W) columns of the whole frames of a video, None where it has none."""
        film, place = evidence.frame_of[b], evidence.place_of[b]
        where = (visual_of(evidence)[b] & (film[:, 0] == number)).nonzero().flatten()
        frames, inverse = film[where, 1].unique(return_inverse=True)
        corner = torch.full((len(frames), 2), 1 << 30, device=where.device).scatter_reduce(
            0, inverse[:, None].expand(-1, 2), place[where, 2:4], "amin"
        )
        at = place[where, 2:4] - corner[inverse]
        h, w = (int(n) + 1 for n in at.amax(0))
        many = torch.bincount(inverse, minlength=len(frames))
        cell = at[:, 0] * w + at[:, 1]
        filled = torch.bincount(inverse * h * w + cell, minlength=len(frames) * h * w).view(len(frames), h * w)
        whole = (many == h * w) & (filled == 1).all(1)
        if not bool(whole.any()):
            return None
        mine = whole[inverse]
        order = (inverse[mine] * h * w + cell[mine]).argsort()
        return where[mine][order].view(-1, h, w)


def _renewed(head: Tensor, weight: Tensor, visual: Tensor) -> Tensor:
    """``weight`` of the ``visual`` tokens, scaled so that those of every output sum to 1 again."""
    there = visual & (head >= 0)
    total = torch.zeros_like(weight).scatter_add(0, head[there], weight[there])
    return torch.where(there, weight / total[head.clamp(min=0)].clamp(min=1e-12), weight)
