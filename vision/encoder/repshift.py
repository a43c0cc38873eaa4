"""Representation Shift (arXiv 2508.00367): tokens that a sub-layer changes little are pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["RepresentationShift"]

_DEFAULT_RATIO = 0.8


@dataclass(frozen=True)
class RepresentationShift(
    Reducer, name="repshift", needs=("before",), position="after", paper="2508.00367", title="Representation Shift"
):
    """Representation Shift: keep the tokens whose features change most in a sub-layer, in their order.

    The score of a token is the distance between its features before a sub-layer and after it, in float32. It needs no
    attention map, so fused kernels stay; nothing is saved in the block that is measured. Equal scores keep the lower
    position. Protected tokens always stay and are not ranked.

    Args:
        sub_layer: "mlp" measures the MLP half and prunes behind the block, "attention" measures the attention half and
            prunes before the MLP of the same block.
        distance: "l2", "l1" or "cosine" (one minus the cosine).
        relative: divide the distance by the norm (the same one) of the features before. A few tokens of CLIP and
            DINOv2 with very large features then no longer rank first. Meaningless with "cosine".
        variant: "residual" compares the residual stream before and after, so the score is the norm of what the
            sub-layer adds (after layer scale); "branch" compares the stream with the sub-layer's own output.
        layers: 0-based layers that act; by default 0, 3, 6 of 12 and the same places in other depths, as in the
            evaluation command of the official page.
        ratio: share of the unprotected tokens that stays in every acting layer (official page: 0.2 dropped).
        keep: instead of ``ratio``: the patch tokens left after the last acting layer, a count or a ratio, reached by
            equal ratios.

    Only the abstract, the page and summaries were available, so variant, place of the pruning, rounding (half up) and
    the relative score are choices of this implementation.

    Raises ``ValueError`` for unknown names, ``relative`` with "cosine", a bad ``ratio`` or ``keep``, both of them, or
    a layer that the model does not have.
    """

    sub_layer: str = "mlp"
    distance: str = "l2"
    relative: bool = False
    variant: str = "residual"
    layers: tuple[int, ...] | None = None
    ratio: float = _DEFAULT_RATIO
    keep: int | float | None = None

    def __post_init__(self) -> None:
        for name, values in (
            ("sub_layer", ("mlp", "attention")),
            ("distance", ("l2", "l1", "cosine")),
            ("variant", ("residual", "branch")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}, not {getattr(self, name)!r}")
        if self.relative and self.distance == "cosine":
            raise ValueError("relative divides by a norm, which the cosine has done already: use distance l2 or l1")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is the share of tokens kept per layer, in (0, 1], not {self.ratio!r}")
        check_keep(self.keep)
        if self.keep is not None and self.ratio != _DEFAULT_RATIO:
            raise ValueError("give ratio (per layer) or keep (at the end), not both")
        check_layers(self.layers, "layers")

    def acting_position(self) -> str:
        return "after" if self.sub_layer == "mlp" else "middle"

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.layers is None:
            return tuple(sorted({depth * i // 4 for i in range(3)}))
        return stage_layers(self.layers, depth, "layers")

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free = evidence.free()
        if self.keep is None:
            k = count(float(self.ratio), free)
        else:
            layers = self._layers(evidence.depth)
            k = staged(self.keep, evidence, layers) if evidence.layer in layers else free
        if k >= free:
            return Identity.like(evidence.x)
        return Prune(evidence.n, select(self.scores(evidence), k, evidence))

    def scores(self, evidence: EncoderEvidence) -> Tensor:
        """(B,N) shift of every token; higher is more important. Other methods may rank by it."""
        before, after = evidence.before.float(), evidence.x.float()
        if self.variant == "branch":
            after = after - before
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(after, before, dim=-1, eps=1e-12)
        order = 2 if self.distance == "l2" else 1
        shift = (after - before).norm(p=order, dim=-1)
        return shift / before.norm(p=order, dim=-1).clamp(min=1e-12) if self.relative else shift
