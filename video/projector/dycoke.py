"""DyCoke's temporal token merging (arXiv 2411.15024): of most frames, drop what an earlier frame shows too."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenreduce.algorithms.baseline import regular
from tokenreduce.algorithms.projector import kept, share
from tokenreduce.algorithms.scoring import finite
from tokenreduce.algorithms.temporal import Temporal, best_of_frames, by_frame, change, frame_grid, frames_of
from tokenreduce.algorithms.views import marked
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["DyCoke"]


@dataclass(frozen=True)
class DyCoke(Temporal, name="dycoke", paper="2411.15024", title="DyCoke, temporal token merging"):
    """DyCoke before the language model (its "TTM"): one of four frames whole, of the others what differs.

    Every second frame is compared with the one before it and, in every complete group of four, the third with the
    first, by the cosine of embeddings at the same place; such a frame keeps its ``int((1 - dycoke_k) n)`` least similar
    tokens, n being those of a frame.
    Similarities are always those of whole frames. Despite the published name nothing is averaged: tokens are dropped.
    The other part, which hides visual keys and values of the cache while decoding, is ``dycoke-cache``.

    Different from the official code: kept tokens stay in raster order (there by rising similarity), the last complete
    group of four is thinned like the others, a last frame without a partner stays whole (there it is lost), videos of
    up to four frames are no error, ties go to the lower index, and rounding errors of (1 - dycoke_k) n cost no token.

    Args:
        keep: None leaves what ``dycoke_k`` says. A count or ratio replaces it: frames that the rule leaves whole stay
            whole and the rest is shared out evenly among the others, the first ones taking what is left over. A budget
            too small for the whole frames is shared out evenly among these alone: they keep the tokens least similar to
            the whole frame before, the first of them tokens at equal distances (or a regular sub-grid).
        dycoke_k: fraction of a thinned frame that goes, in [0, 1]; per group of four, (4 - 3 dycoke_k) / 4 stays. The
            paper has 0.3, 0.5 and 0.7.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    dycoke_k: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = isinstance(self.dycoke_k, bool) or not isinstance(self.dycoke_k, int | float)
        if wrong or not 0 <= self.dycoke_k <= 1:
            raise ValueError(f"dycoke_k is a number in [0, 1], not {self.dycoke_k!r}")

    def fixed_count(self, present: int, frames: int = 1) -> int:
        if self.keep is not None:
            return self.total(present)
        thinned = sum(bool(step) for step in _steps(frames))
        return present - thinned * (present // frames - self._thin(present // frames))

    def _thin(self, n: int) -> int:
        """What a thinned frame of ``n`` tokens keeps by ``dycoke_k``."""
        return int((1 - self.dycoke_k) * n + 1e-9)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        t, n = frames_of(evidence)
        step = _steps(t)
        whole, thinned = ([i for i in range(t) if bool(step[i]) is thin] for thin in (False, True))
        quota = [0 if s else n for s in step]
        if self.keep is None:
            given = [self._thin(n)] * len(thinned)
        else:
            given = share(max(keep - n * len(whole), 0), [n] * len(thinned))
            for i, some in zip(whole, share(keep, [n] * len(whole)), strict=True):
                quota[i] = some
        for i, some in zip(thinned, given, strict=True):
            quota[i] = some
        x = by_frame(evidence)
        if sum(quota) == t * n:
            return Identity.like(evidence.x)
        reference = [i - s for i, s in enumerate(step)]
        for before, i in itertools.pairwise(whole):
            reference[i] = before
        score = finite(change(x, reference), evidence)
        score[:, 0] = regular(n, quota[0], frame_grid(evidence), x.device).float()
        stay = best_of_frames(score, torch.tensor(quota, device=x.device))
        return kept(marked(stay.flatten(1), sum(quota)), evidence)


def _steps(t: int) -> list[int]:
    """How many frames before each of ``t`` the one stands that it is compared with; 0 for those that stay whole."""
    return [1 if i % 2 else 2 if i % 4 == 2 and i + 1 < t else 0 for i in range(t)]
