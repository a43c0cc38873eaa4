"""V-CAST (arXiv 2603.27650): more tokens for frames where the video turns, in them the unusual and the strong ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenreduce.algorithms.projector import kept
from tokenreduce.algorithms.scoring import finite, unit
from tokenreduce.algorithms.temporal import Temporal, best_of_frames, by_frame
from tokenreduce.core.budget import check_count, count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["VCAST"]


@dataclass(frozen=True)
class VCAST(Temporal, name="vcast", paper="2603.27650", title="V-CAST"):
    """V-CAST: frames share the budget by the curvature of the video, and keep their unusual and strong tokens.

    With r the normalised mean of a frame, its curvature is 1 - cos(r - r before, r behind - r), and 1 for the first and
    the last frame. Shares are the softmax over frames of curvature / ``temperature``. Every frame gets ``min_k`` tokens
    where there are enough, and its share of the rest, rounded down, at most all it has; what is left goes one by one
    to the frame with the largest fraction that was cut off, which keeps its fraction and so goes on receiving until it
    is full (ties: the earlier), as in the official code. Inside a frame the tokens with the largest
    (1 - cos(x, r)) + norm stay, the norm scaled to [0, 1] over the frame; raster order. The paper calls these anchors
    of high entropy and of diversity; the code, which is followed, has no entropy. A still video, whose differences are
    zero, has curvature 1 everywhere.

    Different from the official code: samples of a batch are independent (it switches itself off there), ties go to the
    lower index, and exactly ``keep`` tokens stay, see ``official_totals``. A video of one frame is one frame with all
    of the budget. Token scores are float32.

    Args:
        keep: tokens of a video that stay; a ratio is rounded half to even, as in the code.
        min_k: tokens that every frame has, where the budget allows it.
        temperature: of the softmax over frames, > 0.
        official_totals: the code's numbers of tokens: never fewer than ``min_k`` of every frame, whatever ``keep``
            says, and a video of one frame is left whole.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25
    min_k: int = 1
    temperature: float = 0.7
    official_totals: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.min_k, "min_k")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is a finite number > 0, not {self.temperature!r}")

    def total(self, present: int) -> int:
        return count(self.keep, present, "even")

    def fixed_count(self, present: int, frames: int = 1) -> int:
        keep = self.total(present)
        return self._official(keep, present, frames) if self.official_totals else keep

    def _official(self, keep: int, present: int, frames: int) -> int:
        return present if frames == 1 else max(keep, min(frames * self.min_k, present))

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = by_frame(evidence)
        t, n = x.shape[1:3]
        if self.official_totals:
            keep = self._official(keep, t * n, t)
            if keep == t * n:
                return Identity.like(evidence.x)
        middle = unit(x.mean(2))
        shares = (curvature(middle) / self.temperature).softmax(1)
        quota = torch.stack([self.quota(row, keep, n) for row in finite(shares, evidence)])
        stay = best_of_frames(finite(self.score(x, middle), evidence), quota).flatten(1)
        return kept(stay.long().argsort(dim=1, descending=True, stable=True)[:, :keep], evidence)

    def score(self, x: Tensor, middle: Tensor) -> Tensor:
        """(B,T,n) of tokens ``x`` (B,T,n,C), from the normalised means ``middle`` (B,T,C) of their frames."""
        strong = x.norm(dim=-1)
        low, high = strong.amin(2, keepdim=True), strong.amax(2, keepdim=True)
        unusual = 1 - (unit(x) @ middle.unsqueeze(-1)).squeeze(-1)
        return unusual + (strong - low) / (high - low + 1e-6)

    def quota(self, shares: Tensor, keep: int, n: int) -> Tensor:
        """(T,) how many of its ``n`` tokens every frame keeps, by ``shares`` (T,) of one video; ``keep`` in all."""
        t = len(shares)
        least = min(self.min_k, n)
        least = least if keep >= t * least else 0
        rest = keep - t * least
        wanted = shares * rest
        whole = wanted.floor()
        out = (least + whole.long()).clamp(max=n).tolist()
        order = (wanted - whole).argsort(descending=True, stable=True).tolist()
        left = keep - sum(out)
        for i in order:
            more = min(n - out[i], left)
            out[i], left = out[i] + more, left - more
        return torch.tensor(out, device=shares.device)


def curvature(middle: Tensor) -> Tensor:
    """(B,T) how much the path of the frames ``middle`` (B,T,C) turns at each; 1 at its ends."""
    steps = middle.diff(dim=1)
    out = torch.ones_like(middle[..., 0])
    if middle.shape[1] > 2:
        out[:, 1:-1] = 1 - cosine_similarity(steps[:, :-1], steps[:, 1:], dim=-1, eps=1e-6)
    return out
