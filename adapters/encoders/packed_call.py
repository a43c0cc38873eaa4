"""One call of an attention over a packed row, which may be cut into windows: see
:mod:`tokenreduce.adapters.encoders.packed_found`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call

__all__ = ["RowCall"]


class RowCall(Call):
    """One call of the attention of a row of P patches, which asks its attention function once, or once for every window
    in their order.

    Args:
        mask: the mask (1,1,P,P) of a row that is not cut, to which ``added`` was added; None where it is cut.
        added: (P,) what to add to the logits of every key, None for nothing.
        record: keep queries, keys and values.
        glance: attend to next to nothing; only what is recorded is wanted.
    """

    __slots__ = ("_added", "_glance", "_seen", "_start")

    def __init__(
        self, mask: Tensor | None = None, added: Tensor | None = None, *, record: bool = False, glance: bool = False
    ) -> None:
        super().__init__(mask, bias=added is not None, record=record)
        self._added, self._glance, self._start = added, glance, 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        if glance or (added is not None and mask is None):
            self.select = self._window

    def note(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self._seen.append((queries, keys, values))

    def _window(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self._glance:
            return keys[:, :, :1], values[:, :, :1], None
        assert self._added is not None
        start, self._start = self._start, self._start + keys.shape[2]
        return keys, values, self._added[start : self._start][None, None, None]

    def gather(self) -> None:
        """Queries, keys and values of all windows, (P,H,d) each, behind RoPE."""
        if not self._seen:
            return
        q, k, v = (torch.cat(t, 2)[0].transpose(0, 1) for t in zip(*self._seen, strict=True))
        self.queries, self.keys, self.values, self.rotated = q, k, v, (q, k)
        self._seen = []
