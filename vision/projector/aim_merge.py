"""AIM, merging (arXiv 2412.03248): halve the visual embeddings of a view again and again by merging those alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenreduce.algorithms.matching import halvings
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Identity, Merge, Plan

__all__ = ["AIMMerge"]


@dataclass(frozen=True)
class AIMMerge(Projector, name="aim-merge", paper="2412.03248", title="AIM, merging"):
    """AIM before the language model: bipartite merging of the embeddings of a view (image, crop, frame), in steps.

    In each step tokens at even places look for the most similar token (cosine of the embeddings themselves) at an odd
    place, and those with the highest similarity join it. A joined token is the plain mean of itself and all that came
    to it in this step; over several steps this is a mean of means, since sizes do not count. No token is protected.
    The order is the published one: what is left of the even places by descending similarity, then the odd places.

    A step halves the tokens; the last one merges as many as are needed to leave exactly ``keep``. Published are two
    steps for video (196 of a frame to 98, then 49) and three for the 576 tokens of LLaVA-1.5 (``keep=0.125``, 72);
    the published code merges video frames only.

    Decisions: ties go to the lower index; an all-zero embedding has cosine 0 to all others (a division by zero in the
    published code); similarities of later steps are of the float32 means, whatever the embeddings' dtype.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`; 0.25 is the published
            share.

    Raises ``ValueError`` for other values, and for tokens that are protected by a mask or samples of unequal length.
    """

    keep: int | float = 0.25

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        plan: Plan = Identity.like(evidence.x)
        for step in halvings(evidence.x[:, evidence.prefix :], keep, evidence.layer):
            plan = plan.then(_behind(step, evidence.prefix))
        return plan


def _behind(plan: Merge, prefix: int) -> Merge:
    """``plan`` for the same tokens behind ``prefix`` others, which stay."""
    if not prefix:
        return plan
    first = torch.arange(prefix, device=plan.keep.device).expand(len(plan.keep), -1)
    keep = torch.cat([first, plan.keep + prefix], 1)
    return replace(plan, n=plan.n + prefix, keep=keep, src=plan.src + prefix, dst=plan.dst + prefix)
