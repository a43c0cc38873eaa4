"""The soft slimming form of Self-slimmed ViT (arXiv 2111.12624), from tokens instead of learned weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.baseline import spread
from tokenreduce.algorithms.scoring import excluded, finite, inner, key_metric, select, unit
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Pool
from tokenreduce.core.reducer import Reducer

__all__ = ["SoftSlim"]


@dataclass(frozen=True)
class SoftSlim(Reducer, name="soft-slim", needs=("keys",), paper="2111.12624", title="Soft slimming from seeds"):
    """Soft slimming: every token that is left is a weighted mean of all, weights a softmax over the tokens.

    The form is that of Self-slimmed ViT's token slimming module: weights (K,N) whose rows sum to one, the class token
    apart. There a trained network makes the logits; here they are cosines of keys (mean over heads) with those of K
    seeds, divided by a temperature: one step of soft k-means. Seeds are tokens at equal distances, as the baseline
    ``uniform`` keeps them, and outputs stand at their places. Learned weights do not carry over, and nothing is
    trained, so published accuracies are not those of this method.

    Args:
        keep: patch tokens that stay, a count or a ratio.
        temperature: of the softmax, above 0; small ones leave the seeds and what is nearly equal to them.
        layer: 0-based layer that acts, between attention and MLP.

    Raises ``ValueError`` for values other than these, and for a layer that the model does not have.
    """

    keep: int | float = 0.5
    temperature: float = 0.05
    layer: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.layer, "layer")
        if not self.temperature > 0:
            raise ValueError(f"temperature is a number above 0, not {self.temperature!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            raise ValueError(f"layer={self.layer}: the model has layers 0 to {depth - 1}")
        return layer == self.layer

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free = evidence.free()
        k = count(self.keep, free) if free else 0
        if k == free or evidence.layer != self.layer:
            return Identity.like(evidence.x)
        p, out = evidence.prefix, excluded(evidence)
        metric = unit(key_metric(evidence).detach())
        finite(metric.amax(-1), evidence)
        seeds = select(spread(evidence, k, evidence.grid), k, evidence)
        rows = metric.gather(1, seeds[:, p:].unsqueeze(-1).expand(-1, -1, metric.shape[-1]))
        logits = inner(rows, metric[:, p:]) / self.temperature
        fixed = evidence.fixed() if evidence.masked else None
        if out is not None:
            logits = logits.masked_fill(out[:, None], float("-inf"))
        weights = logits.new_zeros(evidence.batch, seeds.shape[1], evidence.n)
        weights[:, p:, p:] = logits.softmax(-1)
        own = torch.nn.functional.one_hot(seeds, evidence.n).to(weights)
        alone = torch.arange(seeds.shape[1], device=seeds.device).expand_as(seeds) < p
        if fixed is not None:  # protected tokens in between stay what they are
            alone = alone | fixed.gather(1, seeds)
        return Pool(evidence.n, torch.where(alone.unsqueeze(-1), own, weights), keep=seeds)
