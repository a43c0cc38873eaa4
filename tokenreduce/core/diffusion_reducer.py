"""Methods of the diffusion stage: tokens merged in front of a module of a denoiser's block, and put back behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.core.evidence.diffusion import DiffusionEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["MODULES", "DiffusionReducer"]

#: The modules of a transformer block of a denoiser, in the order in which they run.
MODULES = ("attn", "crossattn", "mlp")


@dataclass(frozen=True)
class DiffusionReducer(Reducer):
    """Base of the methods inside a denoiser.

    ``plan`` gets a :class:`~tokenreduce.core.evidence.DiffusionEvidence` of what enters a transformer block. The
    adapter computes ``plan.expand(module(plan.reduce(x)))`` for every module that :meth:`modules` names, ``x`` being
    that module's own input (norms included), and adds the residual of all N tokens: no token ever leaves the denoiser.
    Every token must therefore have an output (``Prune`` would leave zeros).
    """

    stage: ClassVar[str] = "diffusion"

    def plan(self, evidence: DiffusionEvidence) -> Plan:
        """Which of the N tokens of a feature map become which of K; a pure function of the evidence."""
        raise NotImplementedError("abstract")

    def modules(self) -> tuple[str, ...]:
        """The modules of a block that run on merged tokens, among :data:`MODULES`."""
        return MODULES[:1]

    def acts_on(self, downsample: int) -> bool:
        """Whether the method acts on feature maps whose sides are those of the latent over ``downsample``."""
        return True
