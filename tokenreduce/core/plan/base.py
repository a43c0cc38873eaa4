"""Plans: which of N tokens become which of K tokens.

A plan is the only thing in the library that decides about tokens. A method computes it, an adapter applies it, and
reports and pictures are made from it. Plans are frozen, live on one device, compare with ``==`` and travel through
safetensors. Index tensors are int64; B is the batch, N the tokens before, K the tokens after.

Every kind has a file of its own and registers with :class:`Plan`; the base knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tokenreduce.core.plan import file
from tokenreduce.core.plan.rows import take

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Base of all plans. ``n`` is N; ``valid`` (B,K) bool marks real outputs where samples keep different numbers."""

    KINDS: ClassVar[dict[str, type[Plan]]] = {}
    n: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Plan.KINDS[cls.__name__] = cls

    # -- what every plan answers ---------------------------------------------------------------------------------
    @property
    def k(self) -> int:
        """Number of output slots K."""
        return self.representatives().shape[1]

    @property
    def batch(self) -> int:
        return self.representatives().shape[0]

    @property
    def device(self) -> torch.device:
        return self.representatives().device

    @property
    def is_identity(self) -> bool:
        """True when every token stays where it is; adapters then touch nothing, so outputs are bit-identical."""
        return False

    def representatives(self) -> Tensor:
        """(B,K): for each output the input token whose position and id it inherits."""
        raise NotImplementedError("abstract")

    def sources(self) -> Tensor:
        """(B,N): the output that each input token went to, or -1 where it was dropped."""
        raise NotImplementedError("abstract")

    def validity(self) -> Tensor | None:
        """(B,K) bool, or None when every output is real."""
        return getattr(self, "valid", None)

    def places(self) -> Tensor:
        """(B,N) bool: input tokens that are the representative of a real output."""
        at, valid = self.representatives(), self.validity()
        if valid is not None:
            at = torch.where(valid, at, self.n)
        marked = torch.zeros(self.batch, self.n + 1, dtype=torch.bool, device=at.device).scatter(1, at, True)
        return marked[:, :-1]

    def untouched(self) -> Tensor:
        """(B,K) bool: outputs that are their representative's value and nothing else."""
        return torch.ones_like(self.representatives(), dtype=torch.bool)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Features (B,N,C) to (B,K,C). ``size`` (B,N) is the number of original tokens behind each token."""
        raise NotImplementedError("abstract")

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        """Sizes (B,N) to (B,K); None stays None where nothing was merged. Invalid outputs get size 0."""
        raise NotImplementedError("abstract")

    def reduce_both(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """:meth:`reduce` and :meth:`reduce_size` in one, which spares plans that weigh by size half of the work."""
        return self.reduce(x, size), self.reduce_size(size)

    def reduce_attention(self, a: Tensor, size: Tensor | None = None) -> Tensor:
        """An attention map (B,H,N,N) to (B,H,K,K): columns of one group are summed, rows averaged like features.

        Where features are summed, maximised or rescaled, rows are averaged under the same weights all the same, so
        that they remain distributions.
        """
        b, h, n, _ = a.shape
        columns = self.summed().reduce(a.permute(0, 3, 1, 2).reshape(b, n, h * n), size)
        k = columns.shape[1]
        rows = columns.view(b, k, h, n).permute(0, 3, 2, 1).reshape(b, n, h * k)
        return self.averaged().reduce(rows, size).view(b, k, h, k).permute(0, 2, 1, 3)

    def summed(self) -> Plan:
        """The plan with every group summed and no weights: what happens to the columns of an attention map."""
        return self

    def averaged(self) -> Plan:
        """The plan with every group averaged under its own weights: what happens to the rows of an attention map."""
        return self

    def gather(self, meta: Tensor) -> Tensor:
        """Any per-token tensor (B,N,...) to (B,K,...): each output takes its representative's entry."""
        return take(meta, self.representatives())

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """(B,K,C) back to (B,N,C): every token receives its output's row, dropped ones ``fill``.

        ``fill`` is a number or a tensor that broadcasts to (B,N,C), for instance the features before the drop.
        """
        source = self.sources()
        out = take(y, source.clamp(min=0))
        missing = (source < 0).view(*source.shape, *([1] * (y.dim() - 2)))
        return torch.where(missing, torch.as_tensor(fill, dtype=y.dtype, device=y.device), out)

    def then(self, other: Plan) -> Plan:
        """The plan that does this and then ``other``. Raises ``ValueError`` unless other.n equals this plan's K."""
        if other.n != self.k:
            raise ValueError(f"cannot compose: the first plan leaves {self.k} tokens, the second expects {other.n}")
        if self.is_identity:
            return other
        if other.is_identity:
            return self
        fused = self._fused(other)
        if fused is not None:
            return fused
        chain: Any = Plan.KINDS["Chain"]
        return cast(Plan, chain(self.n, (*self._links(), *other._links())))

    def _fused(self, other: Plan) -> Plan | None:
        """One plan that does this and then ``other``, where their kinds allow it."""
        return None

    def _links(self) -> tuple[Plan, ...]:
        """The plans that this one is made of."""
        return (self,)

    def matrix(self, size: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """(B,K,N) dense weights such that ``matrix() @ x`` is ``reduce(x)``; quadratic, for tests and pictures."""
        eye = torch.eye(self.n, dtype=dtype, device=self.device).expand(self.batch, -1, -1)
        return self.reduce(eye, size)

    # -- housekeeping --------------------------------------------------------------------------------------------
    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def _settings(self) -> dict[str, Any]:
        return {
            f.name: v for f in fields(self) if not isinstance(v := getattr(self, f.name), Tensor | tuple | torch.device)
        }

    def _described(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What a file says of the plan, with the names under which its tensors go into ``tensors``."""
        mine = self._tensors()
        tensors.update({prefix + name: t for name, t in mine.items()})
        return {"kind": type(self).__name__, "settings": self._settings(), "tensors": {n: prefix + n for n in mine}}

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        moved: Any = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def rows_at(self, rows: Tensor) -> Plan:
        """The same plan for some samples of the batch, ``rows`` (R,)."""
        mine: Any = {name: t[rows] for name, t in self._tensors().items()}
        return replace(self, **mine)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Plan)
        mine, theirs = self._tensors(), other._tensors()
        return (
            self._settings() == other._settings()
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n} -> {self.k}, batch {self.batch})"

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        file.save(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`. Raises ``ValueError`` for a safetensors file without a plan."""
        return cast(Plan, file.load(path, Plan.KINDS))
