"""Plans: which of N tokens become which of K tokens.

A plan is the only thing in the library that decides about tokens. A method computes it, an adapter applies it, and
reports and pictures are made from it. Plans are frozen, live on one device, compare with ``==`` and travel through
safetensors. Index tensors are int64; B is the batch, N the tokens before, K the tokens after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenreduce.readable import readable

__all__ = ["Chain", "Identity", "Merge", "Mix", "Plan", "Pool", "Prune"]

#: Entries of a :class:`Mix` that are added at once.
_CHUNK = 1 << 15


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B,N,...) at ``index`` (B,K) along the token axis."""
    if x.dim() == 2:
        return x.gather(1, index)
    if x.requires_grad:  # the backward of gather is much cheaper than that of index_select
        flat = x.flatten(2)
        out = flat.gather(1, index.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    else:  # copies whole rows, several times faster than gather on a CPU
        first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device).unsqueeze(1)
        out = x.flatten(0, 1).index_select(0, (index + first).flatten())
    return out.view(*index.shape, *x.shape[2:])


def _add_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``base`` (B,K,C) plus ``rows`` (B,R,C) at ``index`` (B,R); where nothing else needs base, it is consumed."""
    k = base.shape[1]
    where = (index + k * torch.arange(base.shape[0], device=index.device).unsqueeze(1)).flatten()
    flat, rows = base.flatten(0, 1), rows.to(base.dtype).flatten(0, 1)  # adds whole rows, unlike scatter_add
    if base.requires_grad or rows.requires_grad or not readable(rows):
        return flat.index_add(0, where, rows).view_as(base)
    return flat.index_add_(0, where, rows).view_as(base)


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

    def untouched(self) -> Tensor:
        """(B,K) bool: outputs that are their representative's value and nothing else."""
        return torch.ones_like(self.representatives(), dtype=torch.bool)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Features (B,N,C) to (B,K,C). ``size`` (B,N) is the number of original tokens behind each token."""
        raise NotImplementedError("abstract")

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        """Sizes (B,N) to (B,K); None stays None where nothing was merged. Invalid outputs get size 0."""
        raise NotImplementedError("abstract")

    def reduce_attention(self, a: Tensor, size: Tensor | None = None) -> Tensor:
        """An attention map (B,H,N,N) to (B,H,K,K): columns of one group are summed, rows averaged like features.

        Where features are summed, maximised or rescaled, rows are averaged under the same weights all the same, so
        that they remain distributions.
        """
        b, h, n, _ = a.shape
        columns = replace_sum(self).reduce(a.permute(0, 3, 1, 2).reshape(b, n, h * n), size)
        k = columns.shape[1]
        rows = columns.view(b, k, h, n).permute(0, 3, 2, 1).reshape(b, n, h * k)
        return _replace_mean(self).reduce(rows, size).view(b, k, h, k).permute(0, 2, 1, 3)

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
        if isinstance(self, Prune) and isinstance(other, Prune):
            valid = other.valid
            if self.valid is not None:
                mine = self.valid.gather(1, other.keep)
                valid = mine if valid is None else mine & valid
            return Prune(self.n, self.keep.gather(1, other.keep), valid)
        first = self.plans if isinstance(self, Chain) else (self,)
        second = other.plans if isinstance(other, Chain) else (other,)
        return Chain(self.n, first + second)

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
        from tokenreduce.plan_file import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`. Raises ``ValueError`` for a safetensors file without a plan."""
        from tokenreduce.plan_file import load

        return load(path)


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Plan):
    """Everything stays. Every operation returns its argument itself."""

    rows: int = 1
    device: torch.device = torch.device("cpu")  # type: ignore[assignment]  # noqa: RUF009 - immutable

    @classmethod
    def like(cls, x: Tensor) -> Identity:
        """The identity on tokens shaped like ``x`` (B,N,...)."""
        return cls(x.shape[1], x.shape[0], x.device)

    k = property(lambda self: self.n)  # type: ignore[assignment]
    batch = property(lambda self: self.rows)  # type: ignore[assignment]
    is_identity = property(lambda self: True)  # type: ignore[assignment]

    def representatives(self) -> Tensor:
        return torch.arange(self.n, device=self.device).expand(self.rows, -1)

    sources = representatives

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return x

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        return size

    def gather(self, meta: Tensor) -> Tensor:
        return meta

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        return y

    def to(self, device: torch.device | str) -> Plan:
        return Identity(self.n, self.rows, torch.device(device))

    def rows_at(self, rows: Tensor) -> Plan:
        return Identity(self.n, rows.shape[0], self.device)


@dataclass(frozen=True, eq=False, repr=False)
class Prune(Plan):
    """Keep the tokens ``keep`` (B,K), in that order; drop the rest."""

    keep: Tensor
    valid: Tensor | None = None

    @classmethod
    def from_mask(cls, stay: Tensor) -> Prune:
        """Keep the tokens marked in ``stay`` (B,N) bool, in order.

        Samples that keep fewer are filled on the left with slots that are not there, so that the last token stays
        last, as generation needs it.
        """
        counts = stay.sum(1).tolist()
        k = max(counts)
        keep = stay.long().argsort(dim=1, stable=True)[:, stay.shape[1] - k :]
        return cls(stay.shape[1], keep, None if min(counts) == k else stay.gather(1, keep))

    def representatives(self) -> Tensor:
        return self.keep

    def sources(self) -> Tensor:
        out = torch.full((self.keep.shape[0], self.n + 1), -1, dtype=torch.long, device=self.keep.device)
        at = self.keep if self.valid is None else torch.where(self.valid, self.keep, self.n)
        return out.scatter(1, at, torch.arange(self.keep.shape[1], device=at.device).expand_as(at))[:, : self.n]

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return take(x, self.keep)

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        if size is None and self.valid is None:
            return None
        out = torch.ones(self.keep.shape, device=self.keep.device) if size is None else size.gather(1, self.keep)
        return out if self.valid is None else out.masked_fill(~self.valid, 0.0)


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
            return _add_rows(out.clone() if w is None else out, self.dst, rows)
        # Mean as a correction of the kept token: untouched outputs stay exact and only R rows are computed.
        w_src = torch.ones_like(self.src, dtype=torch.float32) if w is None else w.gather(1, self.src)
        w_keep = torch.ones_like(self.keep, dtype=torch.float32) if w is None else w.gather(1, self.keep)
        total = w_keep.scatter_add(1, self.dst, w_src)
        share = w_src / total.gather(1, self.dst).clamp(min=torch.finfo(total.dtype).tiny)
        change = (rows - take(out, self.dst)) * share.unsqueeze(-1).to(x.dtype)
        merged = _add_rows(out, self.dst, change)
        return merged if self.norm == "none" else self._restore_norm(x, merged)

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


@dataclass(frozen=True, eq=False, repr=False)
class Pool(Plan):
    """Dense weights (B,K,N): output k is ``sum_n weights[k,n] x[n]``, divided by the row sum if ``normalised``.

    ``keep`` (B,K) are the tokens that outputs take their positions from; by default those that weigh most.
    """

    weights: Tensor
    normalised: bool = True
    by_size: bool = False
    valid: Tensor | None = None
    keep: Tensor | None = None

    def representatives(self) -> Tensor:
        return self.weights.argmax(-1) if self.keep is None else self.keep

    def untouched(self) -> Tensor:
        own = self.weights.gather(2, self.representatives().unsqueeze(-1)).squeeze(-1)
        alone = (self.weights != 0).sum(-1) == 1
        return alone & (own != 0) & (self.normalised | (own == 1))

    def sources(self) -> Tensor:
        best, output = self.weights.max(1)
        return torch.where(best > 0, output, -1)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        w = self.weights.to(x.dtype)
        if self.by_size and size is not None:
            w = w * size.unsqueeze(1).to(x.dtype)
        if self.normalised:
            w = w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        return (w @ x.flatten(2)).view(x.shape[0], w.shape[1], *x.shape[2:])

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        # A token that feeds several outputs is shared out, so that the mass of sizes is conserved.
        size = torch.ones(self.weights.shape[0], self.n, device=self.weights.device) if size is None else size
        share = self.weights / self.weights.sum(1, keepdim=True).clamp(min=torch.finfo(self.weights.dtype).tiny)
        return (share.to(size.dtype) @ size.unsqueeze(-1)).squeeze(-1)

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Every token receives the mean of the outputs it fed, weighted by how much; see :meth:`Plan.expand`."""
        w = self.weights.to(y.dtype).transpose(1, 2)
        total = w.sum(-1, keepdim=True)
        out = (w / total.clamp(min=torch.finfo(w.dtype).tiny)) @ y.flatten(2)
        missing = (total == 0).view(*total.shape[:2], *([1] * (y.dim() - 2)))
        filler = torch.as_tensor(fill, dtype=y.dtype, device=y.device)
        return torch.where(missing, filler, out.view(*out.shape[:2], *y.shape[2:]))


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


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Plan):
    """Several plans, one after the other; exact where a flat assignment would not be (norms, plain means, pools)."""

    plans: tuple[Plan, ...]

    def representatives(self) -> Tensor:
        out = self.plans[0].representatives()
        for plan in self.plans[1:]:
            out = out.gather(1, plan.representatives())
        return out

    def untouched(self) -> Tensor:
        out = self.plans[0].untouched()
        for plan in self.plans[1:]:
            out = plan.gather(out) & plan.untouched()
        return out

    def sources(self) -> Tensor:
        out = self.plans[0].sources()
        for plan in self.plans[1:]:
            out = torch.where(out < 0, -1, plan.sources().gather(1, out.clamp(min=0)))
        return out

    def validity(self) -> Tensor | None:
        out: Tensor | None = None
        for plan in self.plans:
            mine = plan.validity()
            if out is not None:
                out = plan.gather(out)
                out = out if mine is None else out & mine
            else:
                out = mine
        return out

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        for plan in self.plans:
            x, size = plan.reduce(x, size), plan.reduce_size(size)
        return x

    def reduce_size(self, size: Tensor | None) -> Tensor | None:
        for plan in self.plans:
            size = plan.reduce_size(size)
        return size

    def expand(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        if all(not isinstance(p, Pool) for p in self.plans):
            return super().expand(y, fill)
        if isinstance(fill, Tensor):
            raise ValueError("a chain with a pool expands with a number as fill, not a tensor")
        for plan in reversed(self.plans):
            y = plan.expand(y, fill)
        return y

    def to(self, device: torch.device | str) -> Plan:
        return Chain(self.n, tuple(p.to(device) for p in self.plans))

    def rows_at(self, rows: Tensor) -> Plan:
        return Chain(self.n, tuple(p.rows_at(rows) for p in self.plans))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.plans == other.plans

    __hash__ = None  # type: ignore[assignment]


def replace_sum(plan: Plan) -> Plan:
    """``plan`` with every group summed and no weights: what happens to the columns of an attention map."""
    if isinstance(plan, Merge):
        return replace(plan, mode="sum", weights=None, by_size=False, norm="none")
    if isinstance(plan, Chain):
        return Chain(plan.n, tuple(replace_sum(p) for p in plan.plans))
    return cast(Plan, plan)


def _replace_mean(plan: Plan) -> Plan:
    """``plan`` with every group averaged under its own weights: what happens to the rows of an attention map."""
    if isinstance(plan, Merge):
        return replace(plan, mode="mean", norm="none")
    if isinstance(plan, Chain):
        return Chain(plan.n, tuple(_replace_mean(p) for p in plan.plans))
    return plan
