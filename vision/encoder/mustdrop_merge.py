"""MustDrop (arXiv 2411.10803), vision encoder: after the first block, windows of tokens that are alike become one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, descending, finite, unit
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.readable import readable
from tokenreduce.core.reducer import Reducer

__all__ = ["MustDropMerge"]


@dataclass(frozen=True)
class MustDropMerge(
    Reducer, name="mustdrop-merge", stage="encoder", position="after", paper="2411.10803", title="MustDrop, encoder"
):
    """MustDrop in the vision encoder: windows of 3 x 3 tokens that are alike become one token each, after one block.

    The similarity of a window is the mean cosine over all pairs of different tokens in it, of the block's output.
    Windows with at least ``threshold`` are merged into their bottom-right token, as the mean by size (each counts 1
    behind the first block). Later attention gets no size bias, as published. ``mustdrop`` is the method's second phase.

    Images keep different numbers of tokens; slots that a sample does not fill are marked in ``plan.valid``. The
    official code merges as many windows in every image of a batch as the image with fewest allows.

    Args:
        threshold: in [-1, 1].
        keep: instead of ``threshold``: patch tokens left, a count or a ratio, in every image. The windows that are
            most alike are merged; of the last of them only as many tokens as are needed, those first that have the
            highest mean cosine to the others of the window. Fewer tokens than one for each window, and what lies
            outside of windows, cannot be reached; :func:`tokenreduce.record` notes where.
        window: side of the windows.
        layer: 0-based block whose output is reduced.

    Decisions: tokens stay in raster order (the official code puts merged ones in front, which breaks everything that
    counts on places behind the encoder); on a grid whose sides are no multiple of ``window``, the windows that fit are
    used, counted from the top left, and the rest stays; where the grid is not known (and the patches are no square),
    windows are runs of ``window ** 2`` patches; slots without a token do not count in a window, and those with at most
    one token are alike; ties go to the upper left window. In a compiled graph and under
    ``vmap``, which know no data, ``threshold`` leaves as many slots as there were.

    Raises ``ValueError`` for settings outside these ranges, a layer that the model does not have, or tokens that are
    protected by a mask.
    """

    ragged: ClassVar[bool] = True
    gridded: ClassVar[bool] = True

    threshold: float = 0.8
    keep: int | float | None = None
    window: int = 3
    layer: int = 0

    def __post_init__(self) -> None:
        t = self.threshold
        if isinstance(t, bool) or not isinstance(t, int | float) or not -1 <= t <= 1:
            raise ValueError(f"threshold is a cosine in [-1, 1], not {t!r}")
        check_keep(self.keep)
        check_count(self.window, "window", 2)
        check_count(self.layer, "layer")
        if self.keep is not None and t != 0.8:
            raise ValueError("give threshold or keep, not both")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: EncoderEvidence) -> Plan:
        if evidence.masked:
            raise ValueError("mustdrop-merge needs a grid of tokens behind a prefix: give protected as a count")
        n, p, entry = evidence.n, evidence.prefix, evidence.entry - evidence.prefix
        members = _windows(evidence, self.window)
        removed = 0 if self.keep is None else n - p - count(self.keep, entry)
        if not len(members) or (self.keep is not None and removed <= 0):
            return Identity.like(evidence.x)
        similarity, closeness = _alike(evidence, members)
        order = descending(similarity)  # (B,W)
        each = members.shape[1] - 1
        # Sources by window, in a window by closeness; the last member of a window is the one that receives.
        inside = descending(closeness[:, :, :-1]).gather(1, order.unsqueeze(-1).expand(-1, -1, each))
        src, into = members[order].gather(2, inside).flatten(1), members[:, -1][order]
        dst = into.repeat_interleave(each, 1)
        if self.keep is not None:
            if removed > src.shape[1]:
                evidence.note(
                    f"{self.name}: keep={self.keep} asks to merge {removed} tokens, clamped to {src.shape[1]} at layer "
                    f"{evidence.layer} ({len(members)} windows of {each + 1})",
                    f"{self.name}: keep={self.keep} is less than merging every window leaves, and is clamped to that",
                )
            src, dst = src[:, :removed], dst[:, :removed]
            return _merge(n, src, dst, None)
        merged = (similarity >= self.threshold).sum(1, keepdim=True) * each
        joins = torch.arange(src.shape[1], device=src.device) < merged
        if readable(merged):
            most = int(merged.max())
            if most == 0:
                return Identity.like(evidence.x)
            src, dst, joins = src[:, :most], dst[:, :most], joins[:, :most]
        # A sample with fewer sources repeats a token of its least alike window, which nothing joins then.
        spare = into[:, -1:]
        return _merge(n, torch.where(joins, src, spare), torch.where(joins, dst, spare), joins)


def _merge(n: int, src: Tensor, target: Tensor, joins: Tensor | None) -> Plan:
    """The tokens ``src`` (B,R) join the tokens ``target`` (B,R) of ``n``; where ``joins`` (B,R) is False, the two are
    the same one, which stays."""
    gone = torch.ones_like(src, dtype=torch.bool) if joins is None else joins
    # Rows that join nothing repeat a token that is no source, so that no place is written twice with different values.
    stay = torch.ones(src.shape[0], n, dtype=torch.bool, device=src.device).scatter(1, src, ~gone)
    keep = ascending((~stay).long())
    valid: Tensor | None = None
    if joins is None:
        keep = keep[:, : n - src.shape[1]]
    else:
        numbers = stay.sum(1)
        if readable(numbers):
            keep = keep[:, : int(numbers.max())]
        valid = torch.arange(keep.shape[1], device=src.device) < numbers[:, None]
        if readable(joins) and bool(joins.all()):
            joins = valid = None
    slot = stay.long().cumsum(1) - 1
    scale = None if joins is None else joins.float()
    return Merge(n, keep, src, slot.gather(1, target), size_scale=scale, valid=valid)


def _windows(evidence: EncoderEvidence, side: int) -> Tensor:
    """(W,side*side) tokens of every window, row by row; the last one of each is at its bottom right."""
    p, device = evidence.prefix, evidence.x.device
    patches = evidence.n - p
    grid = evidence.grid
    if grid is None or math.prod(grid) != patches:
        edge = math.isqrt(patches)
        if edge * edge != patches or evidence.valid is not None:
            runs = patches // side**2
            return torch.arange(p, p + runs * side**2, device=device).view(runs, side**2)
        grid = (edge, edge)
    rows, cols = grid[-2] // side, grid[-1] // side
    if rows * cols == 0:
        return torch.empty(0, side**2, dtype=torch.long, device=device)
    at = torch.arange(p, evidence.n, device=device).view(-1, grid[-2], grid[-1])[:, : rows * side, : cols * side]
    return at.reshape(-1, rows, side, cols, side).transpose(2, 3).reshape(-1, side**2)


def _alike(evidence: EncoderEvidence, members: Tensor) -> tuple[Tensor, Tensor]:
    """(B,W) mean cosine over the pairs of different tokens in each window, and (B,W,M) of each token to the others;
    slots without a token count in neither and come first."""
    u = unit(evidence.x.detach()[:, members])
    there = torch.ones_like(u[..., 0]) if evidence.valid is None else evidence.valid[:, members].float()
    u = torch.where(there.unsqueeze(-1) > 0, u, 0.0)
    own = u.square().sum(-1)
    to_all = (u * u.sum(2, keepdim=True)).sum(-1) - own  # of each token to all others, without the (M,M) cosines
    number = there.sum(2)
    mean = to_all.sum(2) / (number * (number - 1)).clamp(min=1)
    similarity = finite(torch.where(number < 2, 1.0, mean), evidence)
    return similarity, torch.where(there > 0, to_all, float("inf"))
