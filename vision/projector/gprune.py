"""G-Prune (arXiv 2501.02268): the visual tokens that collect most information on a graph of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, kept, top
from tokenreduce.algorithms.scoring import clean, gram, unit
from tokenreduce.core.budget import check_count, count, proportional
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["GPrune"]

#: What stands for "no edge" in front of the softmax, and below which a logit is none.
_NONE, _ZERO = -5000.0, 1e-6


@dataclass(frozen=True)
class GPrune(Projector, name="gprune", paper="2501.02268", title="G-Prune"):
    """G-Prune: token lengths flow along a graph of similar tokens; those that then hold most, stay. Raster order.

    Tokens with a cosine of at least ``similarity`` are neighbours, itself included. A token sends its length (its norm,
    at first) to its neighbours by the softmax of their cosines over ``temperature``, ``iterate_num`` times; what a
    token holds in the end is divided by the number of its neighbours, so that hubs do not win by being many. A token
    without neighbours keeps what it has, which favours outliers. Everything is float32: the number of neighbours hangs
    on what a softmax rounds to 0.

    An image of an overview and crops (LLaVA-NeXT) is two graphs, that of the overview and that of all crops together,
    as in the official code; without an overview every view is one. There both keep the same ratio, each rounded down;
    here the total is rounded down, and shared out in proportion with the largest remainders. Powers of the graph are
    not formed: the lengths are sent along it ``iterate_num`` times. Zero tokens have no neighbours and send to all
    alike. Ties go to the lower index.

    Args:
        keep: tokens of an image that stay; a ratio is rounded down, as in the code.
        similarity: cosine from which two tokens are neighbours, in [-1, 1].
        temperature: of the softmax, > 0.
        iterate_num: how often lengths are sent, >= 1.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 0.5
    similarity: float = 0.5
    temperature: float = 0.03
    iterate_num: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity is a cosine in [-1, 1], not {self.similarity!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is a finite number > 0, not {self.temperature!r}")
        check_count(self.iterate_num, "iterate_num", 1)

    def total(self, present: int) -> int:
        return count(self.keep, present, "down")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = clean(evidence.x[:, evidence.prefix :].detach().float(), evidence)
        graph = evidence.view if evidence.crops is None else evidence.view.clamp(max=1)
        parts = [w for v in graph.unique().tolist() if len(w := (graph == v).nonzero().flatten())]
        sizes = proportional(keep, [len(w) for w in parts])
        chosen = [w[top(self.score(x[:, w]), k)] for w, k in zip(parts, sizes, strict=True) if k]
        return kept(torch.cat(chosen, 1), evidence)

    def score(self, x: Tensor) -> Tensor:
        """(B,N) what the tokens ``x`` (B,N,C) of one graph hold in the end, over the number of their neighbours."""
        edges = gram(unit(x))
        edges = edges.masked_fill_(edges < self.similarity, 0.0) / self.temperature
        edges = edges.masked_fill_(edges.abs() < _ZERO, _NONE).softmax(2)
        held = x.norm(dim=-1).unsqueeze(1)
        for _ in range(self.iterate_num):
            held = held @ edges
        return held[:, 0] / (edges > 0).sum(2)
