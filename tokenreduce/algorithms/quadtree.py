"""Quadtrees over frames and groups of their leaves over time, as STTM (arXiv 2507.07990) merges videos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import unit

__all__ = ["BORDERS", "Forest", "check_forest", "grouped", "merged"]

#: Whether a node at an odd border is also compared with the corner of its frame, as the official code does by mistake.
BORDERS = ("official", "valid")


def check_forest(spatial: float, temporal: float, root_level: int, border: str, head_dim: int | None) -> None:
    """Raise ``ValueError`` for settings that are none."""
    for name, value in (("theta_s", spatial), ("theta_t", temporal)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
            raise ValueError(f"{name} is a cosine in [-1, 1], not {value!r}")
    if isinstance(root_level, bool) or not isinstance(root_level, int) or root_level < 0:
        raise ValueError(f"root_level is an int >= 0, not {root_level!r}")
    if border not in BORDERS:
        raise ValueError(f"border is one of {BORDERS}, not {border!r}")
    if head_dim is not None and (isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1):
        raise ValueError(f"head_dim is an int >= 1 or None, not {head_dim!r}")


def _parents(side: int) -> Tensor:
    """(side,) the place on the next coarser level of every place on this one: pairs, the first alone where odd."""
    return (torch.arange(side) + side % 2) // 2


@dataclass
class Forest:
    """The pyramid of a video, whatever the thresholds are.

    Args:
        sizes: (rows, columns) of every level, the root's first.
        values: (T,h,w,C) float32 of every level: means of their children, or sums (``weighted``).
        alike: (T,h,w) of every level but the last: the lowest cosine of a node and one of its children.
        head_dim: channels of a head where cosines are taken per head, and averaged.
    """

    sizes: list[tuple[int, int]]
    values: list[Tensor]
    alike: list[Tensor]
    weighted: bool
    head_dim: int | None

    @classmethod
    def of(
        cls, x: Tensor, root_level: int = 1, border: str = "official", weighted: bool = False,
        head_dim: int | None = None,
    ) -> Forest:  # fmt: skip
        """The pyramid on ``x`` (T,H,W,C). Sides are halved, rounded up, until one of them is 2; a grid that starts
        there has one level."""
        x = x.float()
        values = [x]
        alike: list[Tensor] = []
        count = 1
        sizes = [(x.shape[1], x.shape[2])]
        while min(sizes[0]) > 2:
            sizes.insert(0, ((sizes[0][0] + 1) // 2, (sizes[0][1] + 1) // 2))
            count += 1
        sizes = sizes[min(root_level, count - 1) :]
        for h, w in sizes[-2::-1]:
            fine = values[0]
            rows, columns = (_parents(s).to(x.device) for s in fine.shape[1:3])
            cell = (rows[:, None] * w + columns).flatten()
            flat = fine.flatten(1, 2)
            coarse = flat.new_zeros(len(x), h * w, x.shape[3]).index_add(1, cell, flat)
            if not weighted:
                coarse = coarse / torch.bincount(cell, minlength=h * w)[:, None]
            each = _cosine(flat, coarse[:, cell], head_dim)
            low = each.new_full((len(x), h * w), float("inf"))
            low = low.scatter_reduce(1, cell.expand(len(x), -1), each, "amin")
            if border == "official":
                short = torch.bincount(cell, minlength=h * w) < 4
                corner = _cosine(flat[:, :1], coarse, head_dim)
                low = torch.where(short, torch.minimum(low, corner), low)
            values.insert(0, coarse.view(len(x), h, w, -1))
            alike.insert(0, low.view(len(x), h, w))
        return cls(sizes, values, alike, weighted, head_dim)

    def leaves(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """``(leaf, weight, value)``: (T,H*W) the leaf of every cell, numbered by frame and first cell in raster order,
        (T,H*W) the cell's weight in it, and (M,C) the leaves' values."""
        t, (h, w) = len(self.values[0]), self.sizes[-1]
        device = self.values[0].device
        open_ = torch.ones(t, *self.sizes[0], dtype=torch.bool, device=device)
        level = torch.zeros(t, h, w, dtype=torch.long, device=device)
        places, shares = [], []
        for i, size in enumerate(self.sizes):
            at_rows, at_columns, share = self._down(i)
            cell = (at_rows[:, None] * size[1] + at_columns).to(device)
            places.append(cell)
            shares.append(share.to(device))
            if i < len(self.sizes) - 1:
                leaf = open_ & (self.alike[i] >= threshold)
                go = open_ & ~leaf
                level = torch.where(go.flatten(1)[:, cell], i + 1, level)
                rows, columns = (_parents(s).to(device) for s in self.sizes[i + 1])
                open_ = go[:, rows][:, :, columns]
        node = torch.stack(places)[level, torch.arange(h, device=device)[:, None], torch.arange(w, device=device)]
        weight = torch.stack(shares)[level, torch.arange(h, device=device)[:, None], torch.arange(w, device=device)]
        key = (torch.arange(t, device=device)[:, None, None] * len(self.sizes) + level) * (h * w) + node
        names, inverse = key.flatten().unique(return_inverse=True)
        first = torch.full((len(names),), t * h * w, device=device).scatter_reduce(
            0, inverse, torch.arange(t * h * w, device=device), "amin"
        )
        rank = first.argsort().argsort()
        leaf = rank[inverse].view(t, h * w)
        first = first.sort().values
        value = torch.empty(len(names), self.values[0].shape[3], device=device)
        for i in range(len(self.sizes)):
            mine = level.flatten()[first] == i
            frame, at = first[mine] // (h * w), node.flatten()[first[mine]]
            area = torch.bincount(places[i].flatten(), minlength=self.sizes[i][0] * self.sizes[i][1])[at]
            value[mine] = self.values[i].flatten(1, 2)[frame, at] / (area[:, None] if self.weighted else 1)
        return leaf, weight.flatten(1), value

    def _down(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row (H,) and column (W,) on ``level`` of the finest grid's cells, and (H,W) their weight there."""
        h, w = self.sizes[-1]
        rows, columns = torch.arange(h), torch.arange(w)
        parts = torch.ones(h), torch.ones(w)
        for i in range(len(self.sizes) - 1, level, -1):
            up = [_parents(s) for s in self.sizes[i]]
            many = [torch.bincount(u).float()[u] for u in up]
            parts = parts[0] / many[0][rows], parts[1] / many[1][columns]
            rows, columns = up[0][rows], up[1][columns]
        if self.weighted:
            area = torch.bincount(rows)[rows][:, None] * torch.bincount(columns)[columns]
            return rows, columns, 1 / area.float()
        return rows, columns, parts[0][:, None] * parts[1]


def _cosine(a: Tensor, b: Tensor, head_dim: int | None) -> Tensor:
    """(...) cosine of vectors (...,C), mean over heads of ``head_dim`` channels."""
    if head_dim is None:
        return (unit(a) * unit(b)).sum(-1)
    if a.shape[-1] % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the {a.shape[-1]} channels")
    a, b = (t.unflatten(-1, (-1, head_dim)) for t in (a, b))
    return (unit(a) * unit(b)).sum(-1).mean(-1)


def grouped(
    leaf: Tensor, value: Tensor, threshold: float, head_dim: int | None = None, components: bool = False
) -> Tensor:
    """(M,) for every leaf the one that stands for its group: leaves ``leaf`` (T,n) of adjacent frames whose boxes
    overlap, which is to contain each other, are linked where the cosine of ``value`` (M,C) is at least ``threshold``.

    Names spread along links in rounds, which end, as published, once every name names itself: linked leaves can still
    differ then. ``components`` goes on until they do not.
    """
    device = leaf.device
    rep = torch.arange(len(value), device=device)
    if len(leaf) < 2 or threshold <= 0:
        return rep
    pairs = torch.stack([leaf[:-1].flatten(), leaf[1:].flatten()], 1).unique(dim=0)
    pairs = pairs[_cosine(value[pairs[:, 0]], value[pairs[:, 1]], head_dim) >= threshold]
    if not len(pairs):
        return rep
    a, b = pairs.unbind(1)
    while True:
        low = torch.minimum(rep[a], rep[b])
        new = rep.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        new = new[new]
        done = torch.equal(new, rep) if components else torch.equal(new[new], new)
        rep = new
        if done:
            return rep


def merged(
    forest: Forest, spatial: float, temporal: float, keep: int | None, components: bool = False
) -> tuple[Tensor, Tensor]:
    """``(head, weight)``, (T*n,) each: the cell that every cell's output is built around, -1 for none, and its weight
    there. ``keep``: exactly so many outputs, see :func:`_as_many`."""
    if keep is None:
        return _heads(forest, spatial, temporal, components)
    return _as_many(forest, spatial, temporal, components, keep)


def _heads(forest: Forest, spatial: float, temporal: float, components: bool) -> tuple[Tensor, Tensor]:
    leaf, weight, value = forest.leaves(spatial)
    rep = grouped(leaf, value, temporal, forest.head_dim, components)
    flat = leaf.flatten()
    first = torch.full((len(value),), len(flat), device=flat.device)
    first = first.scatter_reduce(0, flat, torch.arange(len(flat), device=flat.device), "amin")
    many = torch.bincount(rep, minlength=len(value))
    return first[rep[flat]], weight.flatten() / many[rep[flat]]


def _as_many(forest: Forest, spatial: float, temporal: float, components: bool, keep: int) -> tuple[Tensor, Tensor]:
    """Both thresholds moved alike, by bisection, to the fewest outputs that are at least ``keep``; of those the ones
    that stand for the fewest cells go, the last first."""
    cells = forest.values[-1].shape[0] * forest.values[-1].shape[1] * forest.values[-1].shape[2]
    device = forest.values[-1].device
    best = torch.arange(cells, device=device), torch.ones(cells, device=device)
    count, low, high = cells, -2.0, 2.0  # below low nothing more merges, above high nothing does
    for _ in range(16):
        middle = (low + high) / 2
        # Where time is not merged it stays so; a threshold below 0 merges all that is linked.
        time = max(temporal + middle, 1e-9) if temporal > 0 else temporal
        made = _heads(forest, spatial + middle, time, components)
        number = len(made[0].unique())
        if number >= keep:
            high = middle
            if number <= count:
                best, count = made, number
        else:
            low = middle
        if number == keep:
            break
    head, weight = best
    if count > keep:
        names, sizes = head.unique(return_counts=True)
        order = sizes.argsort(descending=True, stable=True)[:keep]
        stays = torch.zeros(cells, dtype=torch.bool, device=device).index_fill(0, names[order], True)
        head = torch.where(stays[head], head, -1)
    return head, weight
