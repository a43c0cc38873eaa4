"""Evidence between vision encoder and language model, and what plain evidence answers there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.evidence.attention import need
from tokenreduce.core.evidence.base import BaseEvidence
from tokenreduce.core.evidence.origin import Look
from tokenreduce.core.evidence.pairs import Joint, Through

__all__ = ["VisualEvidence"]


class VisualEvidence(BaseEvidence):
    """Evidence on visual tokens at the entry of a language model, see :class:`BaseEvidence`.

    As it stands here every token is a patch of one image, and what the tower saw is what the evidence holds; where a
    tower and a projector lie behind the tokens, :class:`~tokenreduce.core.evidence.image.ImageEvidence` knows them.

    Args:
        text: (B,M,D) or (B,D) embeddings of the question in the language model's space; ``text_valid`` (B,M) which are
            there.
        times: (B,N) seconds, for video.
        crops: (rows, columns) of crops when view 0 is an overview of the image and views 1.. are its crops, row-major.
        clip: ``(patches (B,N,E), text (B,M,E))`` in the joint space of a CLIP model, where a method asked for it; text
            rows that are not there are zero.
        pixels: (B,N,P) the pixels of every token's area, of the tokens behind the prefix.
        through: ``(rows (B,N,E), projector)``: what enters the projector for every token behind the prefix, and the
            projector on such rows (...,E) as a function to embeddings (...,D), float32.
        segments: (B,T) 0-based segment of every frame of a video, as a method in the tower found them; -1 for a frame
            that it took out, whose tokens stand for nothing.
    """

    def __init__(
        self,
        x: Tensor,
        *args: Any,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        times: Tensor | None = None,
        crops: tuple[int, int] | None = None,
        clip: Joint | tuple[Tensor, Tensor] | None = None,
        pixels: Tensor | None = None,
        through: Through | tuple[Tensor, Callable[[Tensor], Tensor]] | None = None,
        segments: Tensor | None = None,
        **core: Any,
    ) -> None:
        super().__init__(x, *args, **core)
        self.text, self.text_valid, self.times, self.crops = text, text_valid, times, crops
        self._pixels, self._segments = pixels, segments
        self._clip = None if clip is None else Joint(*clip)
        self._through = None if through is None else Through(*through)

    # -- the vision tower ----------------------------------------------------------------------------------------------
    def tower(self, look: Look = None) -> VisualEvidence:
        """Evidence of a block of the vision tower for the same tokens; plain evidence stands for every block."""
        return self

    def per_token(self, score: Callable[[Any], Tensor]) -> Tensor:
        """``score`` (B,N,...) of this evidence, where a tower is behind it computed on its patches and taken to the
        tokens: softmax, and means over queries, then are those of the tower."""
        return score(self)

    def of_pixels(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,N) for the tokens behind the prefix: ``score`` makes (B,T,n) of the pixels (B,T,n,P) of T frames, where
        tokens are made of patches computed on these."""
        pixels = need(self._pixels, "pixels")
        return score(pixels.reshape(self.batch, self.frames, -1, pixels.shape[-1])).flatten(1)

    def pooling(self) -> tuple[Tensor, Tensor] | None:
        """The pooling head of the vision tower: (B,N) attention of its query to the tokens behind the prefix, mean
        over heads, and (B,T,C) what it makes of every view; None where a tower has none or nobody asked."""
        return None

    @property
    def features(self) -> Tensor:
        """(B,N,C) what enters the projector; ``x`` where nothing else is known."""
        return self.x

    @property
    def projected(self) -> Tensor:
        """(B,N,D) embeddings behind the projector, of the tokens behind the prefix."""
        return self.x[:, self.prefix :]

    @property
    def clip(self) -> Joint:
        """Patches (B,N,E) and question (B,M,E) in the joint space of a CLIP model."""
        if self._clip is None:
            raise ValueError("this method needs clip, which the evidence lacks: name a CLIP model in its setting clip")
        return self._clip

    @property
    def through(self) -> Through:
        """What enters the projector for every token behind the prefix, and the projector as a function."""
        if self._through is None:
            raise ValueError("this method needs through, which the evidence lacks: give Evidence(through=...)")
        return self._through

    @property
    def segments(self) -> Tensor:
        """(B,T) segments of frames, see above; one frame is one."""
        if self._segments is None and self.frames == 1:
            return torch.zeros(self.batch, 1, dtype=torch.long, device=self.x.device)
        return need(self._segments, "segments")

    # -- places --------------------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid that the tokens behind the prefix lie on. Raises ``ValueError`` when unknown."""
        if self.grid is not None:
            return self.grid[-2], self.grid[-1]
        side = math.isqrt(self.n - self.prefix)
        if side * side != self.n - self.prefix:
            raise ValueError(f"{self.n - self.prefix} tokens are no square grid: give Evidence(grid=(rows, columns))")
        return side, side

    @property
    def place(self) -> Tensor:
        """(N,2) row and column of every token behind the prefix on :attr:`shape`."""
        at = torch.arange(self.n - self.prefix, device=self.x.device)
        return torch.stack([at // self.shape[1] % self.shape[0], at % self.shape[1]], 1)

    @property
    def view(self) -> Tensor:
        """(N,) 0-based view (overview, crop, frame) of every token behind the prefix."""
        return torch.zeros(self.n - self.prefix, dtype=torch.long, device=self.x.device)

    @property
    def frames(self) -> int:
        """Number of frames, which have as many tokens each: T of a grid (T,rows,columns), 1 without one."""
        return self.grid[0] if self.grid is not None and len(self.grid) == 3 else 1
