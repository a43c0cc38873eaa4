"""InfiniPot-V (arXiv 2506.15745): between blocks of a video, keep what the newest frames lack and what is loud."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.keys import check_finite, keep_slots
from tokenreduce.algorithms.scoring import unit
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import BudgetError, check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["InfiniPotV"]


@dataclass(frozen=True)
class InfiniPotV(CacheReducer, name="infinipot-v", needs=("frames",), paper="2506.15745", title="InfiniPot-V"):
    """InfiniPot-V: a memory of video frames, compressed after every block without knowing the question.

    A sample's visual slots are f frames of p slots; K of them stay in every KV head. A share of them (TaR) is the last
    ``floor(f * query_ratio)`` frames, and of the older slots those whose key is least like the keys at the same place
    of these frames (mean cosine). The rest (VaN) are those with the largest norm of the value. Text stays. In a stream
    the plan is asked for behind every block; in a plain generation once, behind the prompt.

    Args:
        keep: K, a count or a ratio of the visual slots, instead of ``compress_frame_num``.
        compress_frame_num: frames' worth of slots that stay; 24 in the paper.
        block_size: frames' worth of slots from which on the memory is compressed; 32 in the paper, where blocks fill it
            exactly. None compresses it behind every block, whatever the stream's blocks are.
        tar_ratio: share of K that TaR fills.
        query_ratio: share of the frames that older ones are compared with, at least one frame.
        adaptive_pooling: average the norms over neighbouring (frame, row, column) first: 7 wide in the first quarter of
            the layers, 5 and 3 in the next, not at all in the last; in the paper by how much norms vary.
        grid_rows: rows of patches of a frame, for pooling.
        token_per_frame: p; by default the number of slots that the newest frame has, which is whole.

    Slots that an earlier round left are no whole frames; they are cut into p at a time all the same, as in the
    published code, so that "the same place" is then another one. The code keeps more frames near a stream's end; a
    memory does not know how long its stream will be. Pooling is over (frame, row, column) where it is 7 wide, over
    (row, column) where it is 5 wide, and over all slots in a row where it is 3 wide; zeros beyond the ends count, and
    the first two are cut to the shortest of the three axes and made odd. The share of VaN is rounded half to even.

    Raises ``ValueError`` for settings out of range, slots that are no multiple of p, a share of TaR too small for the
    frames that it compares with, pooling without ``grid_rows`` or with rows that do not divide p, and NaN.
    """

    keep: int | float | None = None
    compress_frame_num: int = 24
    block_size: int | None = None
    tar_ratio: float = 0.5
    query_ratio: float = 0.25
    adaptive_pooling: bool = False
    grid_rows: int | None = None
    token_per_frame: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.compress_frame_num, "compress_frame_num", 1)
        for name in ("tar_ratio", "query_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], not {getattr(self, name)!r}")
        for name in ("block_size", "grid_rows", "token_per_frame"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name, 1)
        if self.adaptive_pooling and self.grid_rows is None:
            raise ValueError("adaptive_pooling needs grid_rows, the rows of patches that a frame has")

    def plan(self, evidence: CacheEvidence) -> Plan:
        visual = evidence.visual
        stay = evidence.there.clone()
        for row in range(len(visual)):
            at = visual[row].nonzero().flatten()
            if len(at):
                stay[row, at] = self._kept(evidence, row, at)
        return keep_slots(stay, evidence)

    def _kept(self, evidence: CacheEvidence, row: int, at: Tensor) -> Tensor:
        """(V,) bool: which of the V visual slots ``at`` of a head stay."""
        v = len(at)
        if self.keep is not None:
            k = min(self.keep, v) if isinstance(self.keep, int) else max(1, int(self.keep * v + 0.5))
            if k == v:
                return torch.ones_like(at, dtype=torch.bool)
            loud, p = round((1 - self.tar_ratio) * k), self._slots_of_a_frame(evidence, row, at)
        else:
            p = self._slots_of_a_frame(evidence, row, at)
            k, loud = self.compress_frame_num * p, round((1 - self.tar_ratio) * self.compress_frame_num * p)
        if k >= v or (self.block_size is not None and v < self.block_size * p):
            return torch.ones_like(at, dtype=torch.bool)
        if v % p:
            raise ValueError(
                f"{v} visual slots are no frames of {p}; infinipot-v needs frames of equal size, so give "
                f"token_per_frame, and no method before it that leaves frames unequal numbers of tokens"
            )
        f = v // p
        first = self._unlike(evidence.keys[row, at].view(f, p, -1), k - loud)
        worth = self._loudness(evidence, evidence.values[row, at].float().norm(dim=-1).view(f, p)).view(1, -1)
        every = torch.ones_like(worth, dtype=torch.bool)
        check_finite(worth, every)
        return best(worth.masked_fill(first, float("inf")), every, torch.full_like(at[:1, None], k))[0]

    def _slots_of_a_frame(self, evidence: CacheEvidence, row: int, at: Tensor) -> int:
        if self.token_per_frame is not None:
            return self.token_per_frame
        if not evidence.has_frames:
            raise ValueError(
                "infinipot-v needs to know frames: give frame_of=... to the evidence, or set token_per_frame"
            )
        frames = evidence.frame_of[row, at]
        return int((frames == frames.max()).sum())

    def _unlike(self, keys: Tensor, share: int) -> Tensor:
        """(V,) bool: the recent frames of ``keys`` (f,p,d), and the older slots that are least like them."""
        f, p = keys.shape[:2]
        chosen = torch.zeros(f, p, dtype=torch.bool, device=keys.device)
        if self.tar_ratio == 0:
            return chosen.flatten()
        recent = max(1, int(f * self.query_ratio))
        if share < recent * p:
            raise BudgetError(
                f"tar_ratio={self.tar_ratio} leaves {share} slots for {recent} recent frames of {p} slots, which stay; "
                f"give a larger tar_ratio or keep, or a smaller query_ratio"
            )
        keys = unit(keys)
        old = f - recent
        score = -(keys[:old] * keys[old:].mean(0)).sum(-1).view(1, -1)
        every = torch.ones_like(score, dtype=torch.bool)
        check_finite(score, every)
        wanted = torch.full((1, 1), share - recent * p, device=keys.device)
        chosen[:old] = best(score, every, wanted).view(old, p)
        chosen[old:] = True
        return chosen.flatten()

    def _loudness(self, evidence: CacheEvidence, norms: Tensor) -> Tensor:
        """(f,p) norms, smoothed where that is asked for."""
        width = (7, 5, 3, 1)[min(3, evidence.layer // max(1, evidence.depth // 4))]
        if not self.adaptive_pooling or width == 1:
            return norms
        if width == 3:
            return F.avg_pool1d(norms.view(1, 1, -1), 3, 1, 1).view_as(norms)
        assert self.grid_rows is not None
        f, p = norms.shape
        if p % self.grid_rows:
            raise ValueError(f"a frame of {p} slots has no {self.grid_rows} rows; give the grid_rows of its patches")
        grid = norms.view(1, f, self.grid_rows, -1)
        kernel = min(width, *grid.shape[1:])
        kernel -= 1 - kernel % 2
        if kernel < 2:
            return norms
        if width == 7:
            return F.avg_pool3d(grid[None], kernel, 1, kernel // 2).view(f, p)
        return F.avg_pool2d(grid, kernel, 1, kernel // 2).view(f, p)
