"""Evidence on whole frames of a video inside a vision encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenreduce.core.evidence.encoder import EncoderEvidence

__all__ = ["FrameEvidence"]


class FrameEvidence(EncoderEvidence):
    """Evidence whose tokens are the frames of a video, in time: ``x`` (B,T,S*C) are those of a block's output, with the
    features of their ``places`` S side by side, class tokens and registers left out."""

    def __init__(self, x: Tensor, *, places: int, **core: Any) -> None:
        super().__init__(x, **core)
        self.places = places
