"""Evidence inside a denoiser: the tokens of a feature map at one step of a diffusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenreduce.core.evidence.base import BaseEvidence

__all__ = ["DiffusionEvidence"]


class DiffusionEvidence(BaseEvidence):
    """Evidence at a transformer block of a denoiser, see :class:`BaseEvidence`.

    ``x`` (B,N,C) is what enters the block, before its norms; ``grid`` its feature map, row-major; ``layer`` counts the
    blocks of the whole denoiser in the order in which they run. Conditional and unconditional rows of classifier-free
    guidance are one batch, as the pipeline makes it.

    Args:
        timestep: the step's time as the pipeline gives it to the denoiser, a number or a tensor of one or of B (whose
            first counts); None where it is not known.
    """

    def __init__(self, x: Tensor, *args: Any, timestep: Tensor | float | None = None, **core: Any) -> None:
        super().__init__(x, *args, **core)
        self.timestep = timestep
