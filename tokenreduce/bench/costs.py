"""What a vision transformer costs as a function of the tokens in each layer: the paper's formula, or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import record
from tokenreduce.patching import describe, patched

__all__ = ["Costs", "Forward", "logits"]

Forward = Callable[[nn.Module, Tensor], Any]


def logits(model: nn.Module, images: Tensor) -> Any:
    """What ``model`` returns for ``images``, or its ``.logits`` where it returns several things by name."""
    out = model(images)
    return getattr(out, "logits", out)


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of an encoder whose blocks are alike, for one image, as a function of the tokens behind each block.

    ``tokens`` enter; a block costs ``linear`` per token and ``square`` per pair of tokens in its attention half, and
    ``feed`` per token that is left in its MLP half; ``base`` is everything else.
    """

    tokens: int
    base: float
    linear: float
    square: float
    feed: float

    def gmacs(self, left: Sequence[Any]) -> Any:
        """Giga multiply-adds when ``left[l]`` tokens (numbers or tensors) leave layer l, protected ones included."""
        total: Any = self.base
        n: Any = self.tokens
        for after in left:
            total = total + self.linear * n + self.square * n * n + self.feed * after
            n = after
        return total / 1e9

    @classmethod
    def vit(
        cls, tokens: int, width: int, patch: int, classes: int = 1000, mlp_ratio: float = 4.0, channels: int = 3
    ) -> Costs:
        """DiffRate's formula (arXiv 2305.17997) for a plain ViT; it counts the patch embedding once for every token.

        >>> round(Costs.vit(197, 384, 16).gmacs([197] * 12), 3)
        4.599
        """
        base = tokens * width * channels * patch**2 + width * classes
        return cls(tokens, base, 4 * width**2, 2 * width, 2 * mlp_ratio * width**2)

    @classmethod
    def measure(cls, model: nn.Module, images: Tensor, forward: Forward | None = None) -> Costs:
        """Counted by ``torch.utils.flop_counter`` on one image of ``images`` (B,C,H,W), with tokens cut off on trial.

        Raises ``ValueError`` for a model with less than two layers or four patches, and what :func:`tokenreduce.patch`
        raises.
        """
        towers = describe(model).towers
        depth, prefix = len(towers[0].blocks), towers[0].prefix
        run = forward or logits

        def cost(layer: int, keep: int) -> tuple[float, int]:
            with torch.no_grad(), patched(model, _Cut(layer, keep)), record(model) as trace:
                run(model, images[:1])
            return trace.flops / 2, trace.tokens[0]

        dense, n = cost(-1, 0)
        few, half = prefix + (n - prefix) // 4, prefix + (n - prefix) // 2
        if depth < 2 or few == prefix:
            raise ValueError(
                f"measuring costs takes 2 layers and 4 patches, this model has {depth} and {n - prefix}; "
                "give costs=Costs(...)"
            )
        # A cut behind the last attention saves MLP only; one layer earlier it also saves the last attention.
        feed = (dense - cost(depth - 1, half)[0]) / (n - half)
        slope = [(dense - cost(depth - 2, k)[0]) / (n - k) - 2 * feed for k in (half, few)]
        square = (slope[0] - slope[1]) / (half - few)
        linear = slope[0] - square * (n + half)
        return cls(n, dense - depth * n * (linear + square * n + feed), linear, square, feed)


@dataclass(frozen=True)
class _Cut(Reducer):
    """Keeps the first ``keep`` tokens behind one layer's attention, to see what the others cost."""

    layer: int
    keep: int

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer == self.layer

    def plan(self, evidence: Evidence) -> Plan:
        first = torch.arange(self.keep, device=evidence.x.device)
        return Prune(evidence.n, first.expand(evidence.batch, -1))
