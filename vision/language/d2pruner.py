"""D2Pruner (arXiv 2512.19443): attention freed of its bias to places, then tokens that differ from each other."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, gram, unit
from tokenreduce.algorithms.sequence import keep_chosen, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["D2Pruner"]


@dataclass(frozen=True)
class D2Pruner(
    Reducer, name="d2pruner", stage="language", needs=("attention", "places"), paper="2512.19443", title="D2Pruner"
):
    """D2Pruner: pivots by debiased attention, then a greedy maximal independent set of the others.

    Importance is the attention that the last token pays in the layer before, mean over heads, divided by a prior: what
    the model pays to that place of any image (plus ``eps``). ``pivot_ratio`` of the budget, rounded down, goes to the
    most important tokens. The others are walked by importance: each is taken while it is available, and makes its
    neighbours unavailable. Tokens are neighbours where (1 - spatial_weight) * (1 + cos) / 2 + spatial_weight * near
    exceeds ``similarity_threshold``: cos is that of the features that enter the layer, near is 1 within ``radius`` rows
    and columns on the same plane of the same image. What is missing in the end comes by importance. Order and positions
    stay.

    The official code could not be had; this follows descriptions and re-implementations. Ours, for want of a source:
    the scaling of cosines to [0, 1], nearness, filling by importance, and that pivots block nobody unless
    ``block_pivots``.

    Args:
        layer: 0-based first layer that sees fewer tokens.
        keep: visual tokens that stay, a count or a ratio, rounded half up.
        prior: safetensors file with a tensor ``prior``, mean attention per token of an image, made with
            :func:`tokenreduce.measure.prior.attention_prior`. Images must have as many tokens, or a multiple (tiles);
            tiled ones repeat it and cut it. None is no debiasing: attention itself.
        pivot_ratio: share of the budget that is taken by importance alone, in [0, 1].
        similarity_threshold: from which two tokens are neighbours, in [0, 1].
        spatial_weight: weight of nearness, in [0, 1]; 0.5 for localisation.
        radius: rows and columns within which tokens are near.
        block_pivots: whether neighbours of pivots are unavailable from the start.
        eps: added to the prior.

    Raises ``ValueError`` for other values, a ``layer`` that the model does not have, a file without a prior, and
    images of a size that the prior is not for: nothing is interpolated in silence.
    """

    layer: int = 2
    keep: int | float = 0.25
    prior: str | None = None
    pivot_ratio: float = 0.7
    similarity_threshold: float = 0.8
    spatial_weight: float = 0.0
    radius: int = 2
    block_pivots: bool = False
    eps: float = 1e-7

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", 1)
        check_keep(self.keep)
        check_count(self.radius, "radius")
        for name in ("pivot_ratio", "similarity_threshold", "spatial_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a number in [0, 1], not {value!r}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps is a finite number > 0, not {self.eps!r}")
        if self.prior is not None and not self.prior:
            raise ValueError("prior is the name of a safetensors file, or None")

    def required(self) -> tuple[str, ...]:
        return ("attention",) if self.prior is None and not self.spatial_weight else self.needs

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the language model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        present, wanted = visual_counts(self.keep, evidence)
        if bool((wanted >= present).all()):
            return Identity.like(evidence.x)
        score = evidence.attention(evidence.last())[:, :, 0].mean(1)
        if self.prior is not None:
            score = score / (self._prior(evidence).to(score.device) + self.eps)
        score = finite(score, evidence)
        stay = torch.zeros_like(visual)
        for b, keep in enumerate(wanted.flatten().tolist()):
            where = visual[b].nonzero().flatten()
            if keep >= len(where):
                stay[b, where] = True
            elif len(where):
                near = self._neighbours(evidence, b, where)
                stay[b, where[self._choose(score[b, where], near, keep)]] = True
        return keep_chosen(stay, evidence)

    def _choose(self, score: Tensor, near: Tensor, keep: int) -> Tensor:
        """(keep,) of the tokens of one sample, by ``score`` (n,) and which are neighbours (n,n)."""
        order = descending(score[None])[0]
        pivots = int(self.pivot_ratio * keep)
        chosen = order[:pivots].tolist()
        blocked = near[order[:pivots]].any(0) if self.block_pivots and pivots else torch.zeros_like(near[0])
        edges, closed, left = near.cpu().numpy(), blocked.cpu().numpy(), []
        for i in order[pivots:].tolist():
            if len(chosen) == keep:
                break
            if closed[i]:
                left.append(i)
                continue
            chosen.append(i)
            closed |= edges[i]
        return torch.tensor([*chosen, *left][:keep], dtype=torch.long, device=score.device)

    def _neighbours(self, evidence: LanguageEvidence, b: int, where: Tensor) -> Tensor:
        """(n,n) bool."""
        similar = (1 + gram(unit(evidence.x[b : b + 1, where].detach()))[0]) / 2
        if self.spatial_weight:
            place = evidence.place_of[b, where]
            same = (place[:, None, :2] == place[None, :, :2]).all(-1)
            near = same & ((place[:, None, 2:4] - place[None, :, 2:4]).abs() <= self.radius).all(-1)
            similar = (1 - self.spatial_weight) * similar + self.spatial_weight * near
        return (similar > self.similarity_threshold).fill_diagonal_(False)

    def _prior(self, evidence: LanguageEvidence) -> Tensor:
        """(B,N) prior of every visual token, 1 for others."""
        assert self.prior is not None
        prior, place = load_prior(self.prior), evidence.place_of
        index, count, tiled = place[..., 4], place[..., 5], place[..., 1] > 0
        there = visual_of(evidence) & (index >= 0)
        wrong = there & (count % len(prior) != 0)
        if bool((wrong & ~self._tiled(place, tiled)).any()):
            raise ValueError(
                f"d2pruner: {self.prior} is a prior for images of {len(prior)} tokens, and an image here has "
                f"{int(count[wrong][0])}; make one for this size with tokenreduce.measure.prior.attention_prior"
            )
        return torch.where(there, prior.to(place.device)[index.clamp(min=0) % len(prior)], 1.0)

    @staticmethod
    def _tiled(place: Tensor, tiled: Tensor) -> Tensor:
        """(B,N) whether a token's image has crops."""
        same = place[:, :, None, 0] == place[:, None, :, 0]
        return (same & tiled[:, None]).any(2)


@functools.lru_cache(maxsize=8)
def load_prior(path: str) -> Tensor:
    """(n,) float32 from a file. Raises ``ValueError`` where there is none."""
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"prior={path!r}: no such file; make one with tokenreduce.measure.prior.attention_prior")
    prior = load_file(path).get("prior")
    if prior is None or prior.dim() != 1 or not len(prior):
        raise ValueError(f"{path} holds no tensor 'prior' with one number per token of an image")
    return prior.float()
