"""Codecs of the cache stage: keys and values of two layers stored as one, with every token kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.core.evidence.cache import CacheEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["CacheCodec", "Paired"]


@dataclass(frozen=True)
class Paired:
    """States (B,H,N,d) of two layers, lower and upper, as a shared ``direction`` (B,H,N,d) and ``norms`` (2,B,H,N).

    ``kept`` (B,H,S) names tokens that are stored as they are, ``originals`` (2,B,H,S,d) of both layers, where
    ``real`` (B,H,S); heads with fewer are filled up.
    """

    direction: Tensor
    norms: Tensor
    kept: Tensor
    real: Tensor
    originals: Tensor

    @property
    def n(self) -> int:
        return self.direction.shape[2]

    @property
    def nbytes(self) -> int:
        some = (self.direction, self.norms, self.kept, self.real, self.originals)
        return sum(t.numel() * t.element_size() for t in some)

    @classmethod
    def of(cls, direction: Tensor, norms: Tensor, kept: Tensor, real: Tensor, originals: Tensor) -> Paired:
        """With fillers that name what is stored anyway, so that their order does not matter."""
        if kept.shape[2]:
            at = torch.arange(kept.shape[2], device=kept.device).expand_as(kept)
            at = torch.where(real, at, real.long().argmax(2, keepdim=True))
            some = real.any(2, keepdim=True)
            kept, real = torch.where(some, kept.gather(2, at), 0), some.expand_as(real)
            originals = originals.gather(3, at[None, ..., None].expand_as(originals))
        return cls(direction, norms, kept, real, originals)

    def restore(self, which: int) -> Tensor:
        """(B,H,N,d) of the lower (0) or upper (1) layer."""
        out = (self.direction.float() * self.norms[which].float().unsqueeze(-1)).to(self.direction.dtype)
        if not self.kept.shape[2]:
            return out
        where = self.kept.unsqueeze(-1).expand_as(self.originals[which])
        return out.scatter(2, where, torch.where(self.real.unsqueeze(-1), self.originals[which], out.gather(2, where)))

    def then(self, other: Paired) -> Paired:
        """These tokens, and those of ``other`` behind them."""
        return Paired.of(
            torch.cat([self.direction, other.direction], 2),
            torch.cat([self.norms, other.norms], 3),
            torch.cat([self.kept, other.kept + self.n], 2),
            torch.cat([self.real, other.real], 2),
            torch.cat([self.originals, other.originals], 3),
        )

    def first(self, n: int) -> Paired:
        """The first ``n`` tokens."""
        real = self.real & (self.kept < n)
        return Paired.of(self.direction[:, :, :n], self.norms[..., :n], self.kept, real, self.originals)

    def rows(self, index: Tensor) -> Paired:
        """Other samples of the batch, ``index`` (R,)."""
        return Paired(
            self.direction[index], self.norms[:, index], self.kept[index], self.real[index], self.originals[:, index]
        )


@dataclass(frozen=True)
class CacheCodec(Reducer):
    """Base of methods that store keys and values of pairs of layers together. No token leaves, and none is merged with
    another; it is asked behind the prefill of a pair's upper layer, and for every new token."""

    stage: ClassVar[str] = "cache"
    unwindowed: ClassVar[bool] = True

    def pairs(self, depth: int) -> tuple[tuple[int, int], ...]:
        """(lower, upper) layers of a model of ``depth``, each layer in one pair at most."""
        raise NotImplementedError("abstract")

    def encode(self, lower: Tensor, upper: Tensor, there: Tensor | None, prompt: bool) -> Paired:
        """Keys, or values, (B,H,N,d) of both layers as one; ``there`` (B,N) marks tokens that are no padding, and
        ``prompt`` is False for tokens of decode steps."""
        raise NotImplementedError("abstract")

    def plan(self, evidence: CacheEvidence) -> Plan:
        """Every token stays."""
        return Identity.like(evidence.keys)

    def plans(self, evidences: Sequence[CacheEvidence]) -> list[Plan]:
        """Every token of every layer stays."""
        return [self.plan(evidence) for evidence in evidences]

    def score(self, evidence: CacheEvidence) -> None:
        """Nothing is ranked."""
        return None

    def acts_at(self, layer: int, depth: int) -> bool:
        return any(layer in pair for pair in self.pairs(depth))
