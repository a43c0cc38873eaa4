"""VisionZip (arXiv 2412.04467): keep the most attended visual tokens, merge the others into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenreduce.algorithms.projector import Projector, Salient
from tokenreduce.algorithms.scoring import descending, finite, inner, key_metric, unit
from tokenreduce.core.budget import check_count, count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Pool, Prune, take

__all__ = ["VisionZip"]


@dataclass(frozen=True)
class VisionZip(Salient, name="visionzip", needs=("tower",), paper="2412.04467", title="VisionZip"):
    """VisionZip: dominant tokens by class-token attention, contextual tokens merged from the rest by key similarity.

    Of the tokens that are not dominant, every ``M // contextual``-th is a target; each other one joins the target with
    the most similar key (mean over heads, cosine), and a target becomes itself plus the mean of those that joined it:
    a sum of two, not their average. Order: class token, dominant tokens as in the image, contextual tokens by target.
    The plan is a :class:`~tokenreduce.core.plan.Pool` whose weights are not normalised, or a Prune where nothing is
    merged.

    ``keep`` splits as 54+10 of 64: contextual tokens are ``keep * 10 / 64`` rounded half up (108+20, 162+30, 27+5; none
    for ``keep`` below 4), the others dominant, and the class token is one of these. A tower without class token ranks
    by the attention that a token receives (as published ports to Qwen and SigLIP do) and has none to keep.

    Different from the official code: no more contextual tokens than tokens are left, ``contextual=0`` is a plain
    prune, zero keys are similar to none, and ties go to the lower index. Keys are taken as the evidence gives them
    (before RoPE where a tower has one), averaged over the patches of a token.

    Args:
        keep: outputs in all, the class token included.
        dominant, contextual: both counts, which then replace ``keep`` (for the whole image as well; views share both in
            proportion); ``dominant`` includes the class token.
        keep_cls: whether the class token is one of the dominant, as in the official code, although LLaVA's own
            selection drops it. Without it all dominant tokens are patches.
        layer: block of the tower that gives attention and keys (official: the one whose output enters the projector).
        score: see :class:`~tokenreduce.algorithms.projector.Salient`.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for one of ``dominant`` and ``contextual`` without the other.
    """

    space: ClassVar[str] = "vision"

    keep: int | float = 64
    dominant: int | None = None
    contextual: int | None = None
    keep_cls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dominant is None) != (self.contextual is None):
            raise ValueError("dominant and contextual are given together, or neither, for a split of keep")
        if self.dominant is not None and self.contextual is not None:
            check_count(self.dominant, "dominant", 1)
            check_count(self.contextual, "contextual")
        if not isinstance(self.keep_cls, bool):
            raise ValueError(f"keep_cls is True or False, not {self.keep_cls!r}")

    def with_class(self) -> bool:
        return self.keep_cls

    def total(self, present: int) -> int:
        return super().total(present) if self.dominant is None else count(sum(self._parts()), present)

    def at(self, keep: int) -> Projector:
        if self.dominant is None:
            return super().at(keep)
        dominant, contextual = self.split(keep)
        return replace(self, dominant=dominant, contextual=contextual)

    def _parts(self) -> tuple[int, int]:
        """(dominant, contextual) as given, or of the paper's 64."""
        return (54, 10) if self.dominant is None or self.contextual is None else (self.dominant, self.contextual)

    def split(self, keep: int) -> tuple[int, int]:
        """(dominant, contextual) of ``keep`` tokens; at least one is dominant."""
        dominant, contextual = self._parts()
        whole = dominant + contextual
        merged = min((2 * keep * contextual + whole) // (2 * whole), keep - 1)
        return keep - merged, merged

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        p, (dominant, contextual) = evidence.prefix, self.split(keep)
        # The class token is one of the dominant; other protected tokens are not counted.
        patches = dominant - int(self.keep_cls and p > 0 and evidence.cls)
        order = descending(self.saliency(evidence)) + p
        front = torch.arange(p, device=order.device).expand(len(order), -1)
        kept = torch.cat([front, order[:, :patches].sort(1).values], 1)
        if not contextual:
            return Prune(evidence.n, kept)
        rest = order[:, patches:].sort(1).values
        at = torch.arange(contextual, device=order.device) * (rest.shape[1] // contextual)
        shares = self._merge(evidence, rest, at)
        weights = shares.new_zeros(len(order), kept.shape[1] + contextual, evidence.n)
        weights[:, : kept.shape[1]].scatter_(2, kept.unsqueeze(-1), 1.0)
        weights[:, kept.shape[1] :].scatter_(2, rest.unsqueeze(1).expand(-1, contextual, -1), shares)
        return Pool(evidence.n, weights, normalised=False, keep=torch.cat([kept, rest[:, at]], 1))

    def _merge(self, evidence: VisualEvidence, rest: Tensor, at: Tensor) -> Tensor:
        """(B,c,M) weights of the tokens ``rest`` (B,M): 1 for the targets ``at`` (c,), 1/n for each of n members."""
        metric = unit(take(evidence.tower(self.layer).per_token(key_metric), rest))
        group = finite(inner(metric, metric[:, at]), evidence).argmax(2)
        member = one_hot(group, len(at)).float()
        member[:, at] = 0
        member = member / member.sum(1, keepdim=True).clamp(min=1)
        member[:, at] = torch.eye(len(at), device=rest.device)
        return member.transpose(1, 2)
