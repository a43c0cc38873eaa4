"""What a layer's cache holds once keys left it: columns by slot, for every KV head.

Heads of one layer may keep other keys, and other numbers of them. The cache stays rectangular: a head that keeps fewer
has slots on the left that nobody sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.adapters.language.indices import ColumnIndex

__all__ = ["Held"]


@dataclass
class Held:
    """The first K slots of a layer's cache hold ``columns`` (B,H,K), ascending; the slots behind hold column ``upto``
    and those that follow. H is 1 where all heads hold the same. ``bias`` (B,H,K) is added to the logits of slots that
    stand for several keys."""

    columns: ColumnIndex
    upto: int
    bias: Tensor | None = None

    @property
    def k(self) -> int:
        return self.columns.k

    def slots(self, total: int) -> ColumnIndex:
        """(B,H,T) what each of the first ``total`` slots holds, filled yet or not."""
        b, h, k = self.columns.at.shape
        device = self.columns.at.device
        new = torch.arange(self.upto, self.upto + max(total - k, 0), device=device).expand(b, h, -1)
        return self.columns.then(ColumnIndex(new)).part(slice(total))

    def slots_behind(self, layer: int, left: int, past: int) -> int:
        """How many of the last slots hold columns from ``left`` on, of ``past`` columns in all. Raises ``ValueError``
        where that is not the same number in every row and head."""
        if left >= self.upto:
            return past - left
        behind, there = self.columns.at >= left, self.columns.there
        counts = set((behind if there is None else behind & there).sum(2).flatten().tolist())
        if len(counts) > 1:
            raise ValueError(
                f"layer {layer} keeps {sorted(counts)} keys of the columns from {left} on, another number in every row "
                f"or head, so that no crop leaves {left}; crop to {self.upto} or more"
            )
        return past - self.upto + counts.pop()

    def crop(self, layer: int, left: int) -> None:
        """Forget all columns but the first ``left``."""
        if left >= self.upto:
            return
        k = self.k - self.slots_behind(layer, left, self.upto)
        self.columns, self.upto = self.columns.part(slice(k)), left
        self.bias = None if self.bias is None else self.bias[..., :k]

    def reorder(self, rows: Tensor) -> None:
        """Follow beams: row i is what row ``rows[i]`` was."""
        self.columns = self.columns.rows(rows)
        self.bias = None if self.bias is None else self.bias[rows]
