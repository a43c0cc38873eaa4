"""Plans that set tokens aside: those that stay go on alone, and all can be made again of them at any later moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.core.plan.prune import Prune
from tokenreduce.core.plan.rows import take

__all__ = ["Rebuild"]


@dataclass(frozen=True, eq=False, repr=False)
class Rebuild(Prune):
    """A :class:`Prune` after which every token that went moves with its neighbours among those that stayed.

    ``anchor`` (B,N,C) are the features when tokens went, ``near`` (B,N,k) the slots (0 to K-1) of the neighbours of
    every token, -1 where it has fewer; those of tokens that stayed have no meaning.
    """

    anchor: Tensor = None  # type: ignore[assignment]
    near: Tensor = None  # type: ignore[assignment]

    def rebuild(self, y: Tensor) -> Tensor:
        """(B,K,C), what became of the tokens that stayed, to all tokens (B,N,C): these themselves, and every other one
        as it was, plus the mean change of its neighbours, summed in float32 at least.

        Raises ``ValueError`` for features of another width than those at the drop.
        """
        if y.shape[-1] != self.anchor.shape[-1]:
            raise ValueError(
                f"tokens of {self.anchor.shape[-1]} channels were set aside, so they cannot be rebuilt from "
                f"{y.shape[-1]} channels; give the features of the same residual stream"
            )
        wide = torch.promote_types(y.dtype, torch.float32)
        change = y.to(wide) - take(self.anchor, self.keep).to(wide)
        moved = self._mean(change)
        return self.expand(y, (self.anchor.to(wide) + moved).to(y.dtype))

    def _mean(self, change: Tensor) -> Tensor:
        """(B,N,C) mean of ``change`` (B,K,C) over the neighbours of every token."""
        total: Tensor | None = None
        for slots in self.near.unbind(-1):  # one after the other: no k copies of all tokens at a time
            one = take(change, slots.clamp(min=0))
            if self.valid is not None:
                one = torch.where((slots >= 0).unsqueeze(-1), one, 0.0)
            total = one if total is None else total + one
        assert total is not None
        count = self.near.shape[-1] if self.valid is None else (self.near >= 0).sum(-1, keepdim=True).clamp(min=1)
        return total / count

    def choice(self) -> Prune:
        """The same tokens go, without what it takes to make them again."""
        return Prune(self.n, self.keep, self.valid)
