"""Evidence inside a vision encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenreduce.core.evidence.attention import need
from tokenreduce.core.evidence.base import BaseEvidence

__all__ = ["EncoderEvidence"]


class EncoderEvidence(BaseEvidence):
    """Evidence at a block of a vision encoder, see :class:`BaseEvidence`.

    Args:
        before: (B,N,C) what went into the sub-layer whose output is ``x``.
    """

    def __init__(self, x: Tensor, *args: Any, before: Tensor | None = None, **core: Any) -> None:
        super().__init__(x, *args, **core)
        self._before = before

    @property
    def before(self) -> Tensor:
        return need(self._before, "before")

    @property
    def proportional(self) -> bool:
        """Whether the model's attention carries the log-size bias."""
        return self.attention.proportional
