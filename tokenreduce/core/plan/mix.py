"""Plans with sparse weights over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenreduce.core.plan.base import Plan
from tokenreduce.core.plan.rows import take

__all__ = ["Mix"]

#: Entries of a :class:`Mix` that are added at once.
_CHUNK = 1 << 15


@dataclass(frozen=True, eq=False, repr=False)
class Mix(Plan):
    """Sparse weights: output ``dst[e]`` gets ``weight[e]`` times token ``src[e]``, for all E entries.

    What :class:`Merge` cannot say, because tokens feed several outputs, or with weights that differ, and
    :class:`Pool` only with K x N numbers. ``keep`` (B,K) are the tokens that outputs take their positions from;
    ``src``, ``dst``, ``weight`` (B,E), where entries of weight 0 fill up samples with fewer. An output whose only entry
    is its own token with weight 1 keeps it bit for bit.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor
    weight: Tensor
    valid: Tensor | None = None

    @classmethod
    def from_samples(cls, n: int, samples: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Mix:
        """From ``(keep (K,), src (E,), dst (E,), weight (E,))`` of every sample; those with fewer outputs are filled on
        the left with slots that are not there."""
        k, e = max(len(s[0]) for s in samples), max(len(s[1]) for s in samples)
        keep = torch.stack([pad(s[0], (k - len(s[0]), 0)) for s in samples])
        src = torch.stack([pad(s[1], (0, e - len(s[1]))) for s in samples])
        dst = torch.stack([pad(s[2] + k - len(s[0]), (0, e - len(s[2])), value=k - 1) for s in samples])
        weight = torch.stack([pad(s[3].float(), (0, e - len(s[3]))) for s in samples])
        short = torch.tensor([k - len(s[0]) for s in samples], device=keep.device)
        valid = torch.arange(k, device=keep.device) >= short[:, None]
        return cls(n, keep, src, dst, weight, None if bool(valid.all()) else valid)

    def representatives(self) -> Tensor:
        return self.keep

    def untouched(self) -> Tensor:
        used = self.weight != 0
        count = torch.zeros_like(self.keep).scatter_add(1, self.dst, used.long())
        own = used & (self.src == self.keep.gather(1, self.dst)) & (self.weight == 1)
        alone = torch.zeros_like(self.keep).scatter_add(1, self.dst, own.long())
        # Slots that are not there have no entry; they count as copies of the token they name.
        missing = torch.zeros_like(self.keep, dtype=torch.bool) if self.valid is None else ~self.valid
        return ((count == 1) & (alone == 1)) | missing

    def sources(self) -> Tensor:
        b, n = self.keep.shape[0], self.n
        best = torch.zeros(b, n, device=self.keep.device).scatter_reduce(1, self.src, self.weight, "amax")
        mine = (self.weight > 0) & (self.weight == best.gather(1, self.src))
        k = self.keep.shape[1]
        out = torch.full((b, n), k, dtype=torch.long, device=self.keep.device)
        out = out.scatter_reduce(1, self.src, torch.where(mine, self.dst, k), "amin")
        return torch.where(out == k, -1, out)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        out, same = take(x, self.keep), self.untouched()
        if bool(same.all()):
            return out
        wide = same.view(*same.shape, *([1] * (x.dim() - 2)))
        # Sums of hundreds of small weights would be lost in half precision, and E rows at once would fill the memory.
        mixed = torch.zeros_like(out, dtype=torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
        sample, entry = ((self.weight != 0) & ~same.gather(1, self.dst)).nonzero(as_tuple=True)
        for b, e in zip(sample.split(_CHUNK), entry.split(_CHUNK), strict=True):
            weight = self.weight[b, e].view(-1, *([1] * (x.dim() - 2))).to(mixed.dtype)
            mixed = mixed.index_add(0, b * self.keep.shape[1] + self.dst[b, e], x[b, self.src[b, e]] * weight)
        return torch.where(wide, out, mixed.view(out.shape).to(x.dtype))

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        # A token that feeds several outputs is shared out, so that the mass of sizes is conserved.
        size = torch.ones(self.keep.shape[0], self.n, device=self.keep.device) if size is None else size
        total = torch.zeros_like(size).scatter_add(1, self.src, self.weight.to(size.dtype))
        share = self.weight.to(size.dtype) / total.gather(1, self.src).clamp(min=torch.finfo(size.dtype).tiny)
        out = torch.zeros(self.keep.shape, dtype=size.dtype, device=size.device)
        return out.scatter_add(1, self.dst, share * size.gather(1, self.src))
