"""Frame differences: what did not change since an earlier frame never enters the vision tower."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import regular
from tokenreduce.algorithms.pixels import PixelReducer
from tokenreduce.algorithms.prediction import apart, refuse_nan

__all__ = ["PixelDiff"]


@dataclass(frozen=True)
class PixelDiff(PixelReducer, name="pixel-diff", title="Frame differences before the vision tower"):
    """Frame differences: drop the units of a video whose pixels are those at the same place of an earlier frame.

    The first frame stays whole. A unit of a later one goes where it is like (``tolerance``, boundary included) the last
    one at its place that stayed. Every frame keeps at least the unit that changed most, ties to the first, since a
    tower cannot see a frame of nothing and prompts name every frame. An image, a video of one frame, stays as it is. A
    temporal position that a model joins of two frames counts as one frame with the pixels of both.

    Args:
        tolerance, metric, keep, std: see :class:`~tokenreduce.algorithms.pixels.PixelReducer`. With ``keep``, a share
            or number over the whole video, units are ranked by their distance from the frame before, ties to the first;
            where it leaves no room for the first frame, that keeps units at equal distances, an image too.
        anchored: compare with the last unit that stayed, so that slow changes add up; else with the frame before.

    Raises ``ValueError`` for values other than these.
    """

    temporal: ClassVar[bool] = True

    anchored: bool = True

    def gone(self, units: Tensor) -> Tensor:
        out, last = [torch.zeros_like(units[:, 0, ..., 0], dtype=torch.bool)], units[:, 0]
        for now in units.unbind(1)[1:]:
            gap = apart(now, last, self.metric)
            refuse_nan(gap)
            same = (gap <= self.limit) & ~_most(gap)
            out.append(same)
            last = torch.where(same.unsqueeze(-1), last, now) if self.anchored else now
        return torch.stack(out, 1)

    def scores(self, units: Tensor, keep: int) -> Tensor:
        b, t, rows, cols, _ = units.shape
        gaps = [apart(now, before, self.metric) for before, now in itertools.pairwise(units.unbind(1))]
        later = [gap.masked_fill(_most(gap), float("inf")) for gap in gaps]
        room = min(keep - (t - 1), rows * cols)
        first = regular(rows * cols, room, (rows, cols), units.device).view(rows, cols)
        first = torch.where(first, float("inf"), float("-inf")).expand(b, -1, -1)
        return torch.stack([first, *later], 1)


def _most(gap: Tensor) -> Tensor:
    """(B,rows,cols) bool: the first of the largest in every sample."""
    flat = gap.flatten(1)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.argmax(1, keepdim=True), True).view_as(gap)
