"""MiniCache (arXiv 2405.14366): neighbouring deep layers share the directions of their keys and of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.sequence import packed
from tokenreduce.core.budget import check_count
from tokenreduce.core.cache_codec import CacheCodec, Paired

__all__ = ["MiniCache"]


@dataclass(frozen=True)
class MiniCache(CacheCodec, name="minicache", paper="2405.14366", title="MiniCache"):
    """MiniCache: from the middle of the model on, two layers store one direction and two magnitudes for each token.

    The direction is the spherical interpolation of both layers' unit vectors, in every KV head, of keys and of values
    by themselves. Tokens whose directions differ most keep both originals: those with d > d_max - gamma * (d_max -
    d_min), where d is the angle over pi and the extremes are of one sample, over its heads and tokens. A layer
    attends to the direction times its own magnitudes, and to originals where there are any. All tokens stay, so there
    is no ``keep``: of two layers' d numbers each, d + 2 are left of most tokens, and three quarters of the whole cache.

    Args:
        start: first layer of the first pair; half of the layers by default. With an odd number of layers behind it, the
            last one is left alone.
        t: where between the lower (0) and the upper layer (1) the direction is.
        gamma: share of the span of distances, from its upper end, that is kept in originals; 0.05 in the paper.
        rule: "differ" as above, the only reading that fits both statements of the paper: about one token in twenty is
            kept, and more with a larger gamma. "guide" keeps d > d_min + gamma * (d_max - d_min), as one description
            prints it, which is nearly all; "printed" keeps what does not exceed that, as xKV's code does.

    Decisions: tokens of decode steps are always merged (the paper does not say); nearly equal and opposite directions
    are interpolated linearly; where one vector is 0, the other's direction is the shared one. Published rates include
    4-bit quantisation, which is not part of it.

    Raises ``ValueError`` for settings out of range.
    """

    start: int | None = None
    t: float = 0.6
    gamma: float = 0.05
    rule: Literal["differ", "guide", "printed"] = "differ"

    def __post_init__(self) -> None:
        if self.start is not None:
            check_count(self.start, "start")
        for name in ("t", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], not {getattr(self, name)!r}")

    def pairs(self, depth: int) -> tuple[tuple[int, int], ...]:
        first = depth // 2 if self.start is None else self.start
        return tuple((i, i + 1) for i in range(first, depth - 1, 2))

    def encode(self, lower: Tensor, upper: Tensor, there: Tensor | None, prompt: bool) -> Paired:
        norms = torch.stack([lower.float().norm(dim=-1), upper.float().norm(dim=-1)])
        if bool(norms.isnan().any()):
            raise ValueError("keys or values of the cache hold NaN; the model's activations overflowed")
        a, b = (x.float() / norm.clamp(min=1e-30).unsqueeze(-1) for x, norm in zip((lower, upper), norms, strict=True))
        empty = (norms == 0).any(0)
        angle = (a * b).sum(-1).clamp(-1, 1).arccos().masked_fill(empty, 0.0)
        direction = torch.where(empty.unsqueeze(-1), a + b, _between(a, b, angle, self.t))
        keep = self._kept(angle / math.pi, there) if prompt else torch.zeros_like(empty)
        index, real = (x.unflatten(0, keep.shape[:2]) for x in packed(keep.flatten(0, 1)))
        width = int(keep.sum(2).max())
        index, real = index[..., :width], real[..., :width]
        where = index.unsqueeze(-1).expand(-1, -1, -1, lower.shape[-1])
        originals = torch.stack([lower.gather(2, where), upper.gather(2, where)])
        return Paired.of(direction.to(lower.dtype), norms.to(lower.dtype), index, real, originals)

    def _kept(self, distance: Tensor, there: Tensor | None) -> Tensor:
        """(B,H,N) bool: which tokens are stored as they are."""
        real = torch.ones_like(distance, dtype=torch.bool)
        if there is not None:
            real = real & there[:, None]
        low = distance.masked_fill(~real, float("inf")).amin((1, 2), keepdim=True)
        high = distance.masked_fill(~real, float("-inf")).amax((1, 2), keepdim=True)
        if self.rule == "differ":
            keep = distance > high - self.gamma * (high - low)
        else:
            keep = distance > low + self.gamma * (high - low)
            keep = ~keep if self.rule == "printed" else keep
        return keep & real


def _between(a: Tensor, b: Tensor, angle: Tensor, t: float) -> Tensor:
    """Unit vectors on the way from ``a`` to ``b`` (...,d), ``angle`` (...) apart."""
    sine = angle.sin()
    flat = sine < 1e-4
    safe = sine.masked_fill(flat, 1.0)
    first = torch.where(flat, 1 - t, ((1 - t) * angle).sin() / safe).unsqueeze(-1)
    second = torch.where(flat, t, (t * angle).sin() / safe).unsqueeze(-1)
    out = first * a + second * b
    return torch.where(flat.unsqueeze(-1), out / out.norm(dim=-1, keepdim=True).clamp(min=1e-30), out)
