"""Plans in which groups of tokens become one each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenreduce.core.host import Groups, on_host, values
from tokenreduce.core.plan.base import Plan
from tokenreduce.core.plan.rows import add_rows, take

__all__ = ["Merge"]

_INDICES = ("keep", "src", "dst")


@dataclass(frozen=True, eq=False, repr=False)
class Merge(Plan):
    """Each token goes to one of K outputs or to none.

    ``keep`` (B,K): the token that each output is built around and takes its position from. ``src``, ``dst`` (B,R):
    token ``src`` joins output ``dst``. Tokens in neither are dropped. The value of an output is

    - ``mode="mean"``: the mean of its members, weighted by size (``by_size``) times ``weights`` (B,N);
    - ``mode="sum"``: their sum under the same weights, not normalised;
    - ``mode="max"``: the element-wise maximum; a source of weight 0 takes no part.

    ``norm="max"`` rescales a merged output to the largest norm among its members (MLERP). ``size_scale`` (B,R) damps
    the sizes that sources bring along; a source that brings neither value nor size (weight 0, size_scale 0) is dropped.
    An output without sources keeps its token's value bit for bit in mode mean.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor
    weights: Tensor | None = None
    size_scale: Tensor | None = None
    valid: Tensor | None = None
    mode: str = "mean"
    by_size: bool = True
    norm: str = "none"
    #: The three index tensors as arrays, where a plan is made of these; it has the tensors when somebody asks.
    _arrays: ClassVar[tuple[Any, Any, Any] | None] = None

    @classmethod
    def from_assignment(cls, assign: Tensor, k: int, keep: Tensor | None = None, **settings: Any) -> Merge:
        """From ``assign`` (B,N) with values in [-1,K): -1 drops a token. ``keep`` (B,K) defaults to first members.

        Raises ``ValueError`` if an output has no member or samples drop different numbers of tokens.
        """
        b, n = assign.shape
        position = torch.arange(n, device=assign.device).expand(b, n)
        if keep is None:
            first = torch.full((b, k + 1), n, dtype=torch.long, device=assign.device)
            slot = torch.where(assign < 0, k, assign)
            keep = first.scatter_reduce(1, slot, position, "amin")[:, :k]
            if bool((keep == n).any()):
                raise ValueError("an output has no member: number the outputs 0..K-1 without gaps in every sample")
        is_source = assign >= 0
        is_source = is_source.scatter(1, keep, False)
        counts = is_source.sum(1)
        if b and not bool((counts == counts[0]).all()):
            raise ValueError("samples merge different numbers of tokens; give one plan per sample")
        src = position[is_source].view(b, -1)
        return cls(n, keep, src, assign.gather(1, src), **settings)

    @classmethod
    def of_arrays(cls, n: int, keep: Any, src: Any, dst: Any, **settings: Any) -> Merge:
        """From index arrays of numpy, with which it then works on the CPU."""
        plan = object.__new__(cls)
        plan.__dict__.update(settings, n=n, _arrays=(keep, src, dst))
        return plan

    def __getattr__(self, name: str) -> Any:
        """The index tensors of a plan of arrays, which most forwards never look at."""
        if self._arrays is None or name not in _INDICES:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        made = torch.from_numpy(self._arrays[_INDICES.index(name)])
        self.__dict__[name] = made
        return made

    def representatives(self) -> Tensor:
        return self.keep

    def sources(self) -> Tensor:
        b, k = self.keep.shape
        out = torch.full((b, self.n + 1), -1, dtype=torch.long, device=self.keep.device)
        dst = self.dst
        if self.weights is not None and self.size_scale is not None:
            dst = dst.masked_fill((self.weights.gather(1, self.src) == 0) & (self.size_scale == 0), -1)
        out = out.scatter(1, self.src, dst)
        # Slots that are not there may name any token, also one that went elsewhere.
        at = self.keep if self.valid is None else torch.where(self.valid, self.keep, self.n)
        out = out.scatter(1, at, torch.arange(k, device=out.device).expand(b, k))[:, : self.n]
        if self.valid is not None:
            out = torch.where(self.valid.gather(1, out.clamp(min=0)), out, -1)
        return out

    def untouched(self) -> Tensor:
        alone = torch.ones_like(self.keep, dtype=torch.bool).scatter(1, self.dst, False)
        return alone & (self.mode != "sum" or self.weights is None)

    def _weights(self, size: Tensor | None) -> Tensor | None:
        """(B,N) weights of tokens in their group, or None when all are one."""
        if not self.by_size or size is None:
            return self.weights
        return size if self.weights is None else size * self.weights

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        if self.mode == "mean" and self.src.shape[1] > 0 and self._on_host(x, size):
            return self._host_mean(x, size, self._groups())[0]
        out, rows = take(x, self.keep), take(x, self.src)
        if self.src.shape[1] == 0 and self.mode != "sum":
            return out
        if self.mode == "max":
            if self.weights is not None:
                rows = rows.masked_fill((self.weights.gather(1, self.src) == 0).unsqueeze(-1), float("-inf"))
            return out.scatter_reduce(1, self.dst.unsqueeze(-1).expand_as(rows), rows, "amax")
        w = self._weights(size)
        if self.mode == "sum":
            if w is not None:
                out = out * w.gather(1, self.keep).unsqueeze(-1).to(x.dtype)
                rows = rows * w.gather(1, self.src).unsqueeze(-1).to(x.dtype)
            return add_rows(out.clone() if w is None else out, self.dst, rows)
        merged = self._mean(x, out, rows, *self._weighed(w))
        return merged if self.norm == "none" else self._restore_norm(x, merged)

    def _weighed(self, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B,R) weights of sources, and (B,K) what all members of an output weigh, from (B,N) weights."""
        w_src = torch.ones_like(self.src, dtype=torch.float32) if w is None else w.gather(1, self.src)
        w_keep = torch.ones_like(self.keep, dtype=torch.float32) if w is None else w.gather(1, self.keep)
        return w_src, w_keep.scatter_add(1, self.dst, w_src)

    def _mean(self, x: Tensor, out: Tensor, rows: Tensor, w_src: Tensor, total: Tensor) -> Tensor:
        """The mean as a correction of the kept token: untouched outputs stay exact and only R rows are computed."""
        share = w_src / total.gather(1, self.dst).clamp(min=torch.finfo(total.dtype).tiny)
        change = (rows - take(out, self.dst)) * share.unsqueeze(-1).to(x.dtype)
        return add_rows(out, self.dst, change)

    # -- on the host ---------------------------------------------------------------------------------------------
    def _on_host(self, x: Tensor, size: Tensor | None) -> bool:
        """Whether indices and weights are worked out by numpy; gradients want operators that know their backward."""
        if x.dim() != 3 or (x.requires_grad and torch.is_grad_enabled()):
            return False
        numbers = [t for t in (size, self.weights, self.size_scale) if t is not None]
        for t in numbers:
            if t.dtype != torch.float32:
                return False
        if self._arrays is not None and self.valid is None:
            return on_host(x, *numbers)
        return on_host(x, *numbers, self.keep, self.src, self.dst, self.valid)

    def _shapes(self) -> tuple[tuple[int, ...], int]:
        """(B,K), and R."""
        if self._arrays is not None:
            return self._arrays[0].shape, self._arrays[1].shape[1]
        return tuple(self.keep.shape), self.src.shape[1]

    def _groups(self) -> Groups:
        arrays = self._arrays or (values(self.keep), values(self.src), values(self.dst))
        return Groups.of(self.n, *arrays)

    def _host_mean(self, x: Tensor, size: Tensor | None, groups: Groups) -> tuple[Tensor, Any]:
        """Mode mean on the host: features (B,K,C) and what the members of an output weigh (B*K,)."""
        weights = None if self.weights is None else values(self.weights)
        w = weights if not self.by_size or size is None else values(size)
        if w is not weights and weights is not None:
            w = w * weights
        brought, total = groups.summed(w)
        out = groups.mean(x, brought, total)
        if self.norm != "none":
            out = self._host_norm(x, out, groups, weights)
        return out.view(*self._shapes()[0], x.shape[2]), total

    def _host_norm(self, x: Tensor, merged: Tensor, groups: Groups, weights: Any) -> Tensor:
        """:meth:`_restore_norm` for rows (B*K,C)."""
        norms, own = values(x.float().norm(dim=-1)), values(merged.float().norm(dim=-1))
        largest = groups.largest(norms if weights is None else norms * (weights > 0))
        scale = np.ones_like(own)
        to = groups.dst[own[groups.dst] > 0]
        scale[to] = largest[to] / np.maximum(own[to], np.finfo(np.float32).tiny)
        return merged.mul_(torch.from_numpy(scale[:, None]).to(merged.dtype))

    def _host_size(self, size: Tensor | None, groups: Groups) -> Tensor:
        scale = None if self.size_scale is None else values(self.size_scale)
        total = groups.summed(None if size is None else values(size), scale)[1].reshape(self._shapes()[0])
        if self.valid is not None:
            total[~values(self.valid)] = 0.0
        return torch.from_numpy(total)

    def reduce_both(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        shape, sources = self._shapes()
        if self.mode == "mean" and sources > 0 and self._on_host(x, size):
            groups = self._groups()
            out, total = self._host_mean(x, size, groups)
            if self.by_size and self.weights is None and self.size_scale is None and self.valid is None:
                return out, torch.from_numpy(total.reshape(shape))  # what members weigh is the new size
            return out, self._host_size(size, groups)
        plain = self.mode == "mean" and self.norm == "none" and self.valid is None and self.src.shape[1] > 0
        alike = self.by_size and self.weights is None and self.size_scale is None
        if not (plain and alike and (size is None or size.dtype == torch.float32)):
            return self.reduce(x, size), self.reduce_size(size)
        w_src, total = self._weighed(size)  # what the members of an output weigh is its new size
        return self._mean(x, take(x, self.keep), take(x, self.src), w_src, total), total

    def _restore_norm(self, x: Tensor, merged: Tensor) -> Tensor:
        norms = x.float().norm(dim=-1)
        if self.weights is not None:  # a member without weight has no part in the norm either
            norms = norms * (self.weights > 0)
        largest = norms.gather(1, self.keep).scatter_reduce(1, self.dst, norms.gather(1, self.src), "amax")
        joined = torch.zeros_like(largest).scatter(1, self.dst, 1.0) > 0
        own = merged.float().norm(dim=-1)
        scale = torch.where(joined & (own > 0), largest / own.clamp(min=torch.finfo(own.dtype).tiny), 1.0)
        return merged * scale.unsqueeze(-1).to(merged.dtype)

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        if size is None:
            size = torch.ones(self.keep.shape[0], self.n, device=self.keep.device)
        brought = size.gather(1, self.src)
        if self.size_scale is not None:
            brought = brought * self.size_scale
        out = size.gather(1, self.keep).scatter_add(1, self.dst, brought.to(size.dtype))
        return out if self.valid is None else out.masked_fill(~self.valid, 0.0)

    def summed(self) -> Plan:
        return replace(self, mode="sum", weights=None, by_size=False, norm="none")

    def averaged(self) -> Plan:
        return replace(self, mode="mean", norm="none")
