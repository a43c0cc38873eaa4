"""Where the visual tokens of an image come from: patches, views, crops and places on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

__all__ = ["Look", "Origin", "resolve"]

#: Which block of a vision tower: a 0-based index (negative from the end), a share of its depth (float), or None for
#: the block whose output enters the projector.
Look = int | float | None


def resolve(look: Look, depth: int, feature: int) -> int:
    """0-based block of a tower of ``depth`` blocks: an index (negative from the end), a share of the depth (float), or
    None for ``feature``, the block whose output enters the projector. Raises ``ValueError`` for one that is not there.

    >>> resolve(None, 24, 22), resolve(-1, 24, 22), resolve(9 / 24, 24, 22), resolve(0, 24, 22)
    (22, 23, 9, 0)
    """
    if look is None:
        return feature
    if isinstance(look, float):
        return min(int(look * depth + 0.5), depth - 1)
    if not -depth <= look < depth:
        raise ValueError(f"layer={look}: the vision encoder has layers 0 to {depth - 1}")
    return look % depth


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the N visual tokens of an image come from.

    Args:
        index: (N,M) patches behind each token, numbered ``view * patches + patch`` over the views of the image.
        weight: (N,M) their shares; rows sum to 1, or to 0 for a token that stands for no patch (row ends, class tokens
            of frames), which no method sees. None when each counts 1/M.
        patches: patches of one view.
        view: (N,) 0-based view of each token, -1 for one that stands for no patch.
        place: (N,2) row and column on the grid of the view, or of all crops together where there are ``crops``.
        shape: (rows, columns) of a view's grid of tokens.
        crops: (rows, columns) of crops when view 0 is an overview of the image and views 1.. are its crops, row-major.
    """

    index: Tensor
    weight: Tensor | None
    patches: int
    view: Tensor
    place: Tensor
    shape: tuple[int, int]
    crops: tuple[int, int] | None = None
    #: Views of the image; by default up to the last that has a token.
    count: int | None = None

    @property
    def n(self) -> int:
        return self.index.shape[0]

    @property
    def views(self) -> int:
        if self.count is not None:
            return self.count
        return int(self.view.max()) + 1 if self.n else 0

    def take(self, where: Tensor) -> Origin:
        """The origin of the tokens ``where`` (K,)."""
        weight = None if self.weight is None else self.weight[where]
        if weight is not None and bool((weight.sum(1) == 1).all()) and weight.shape[1] == 1:
            weight = None  # only row ends had none
        return Origin(
            self.index[where], weight, self.patches, self.view[where], self.place[where], self.shape, self.crops,
            self.views,
        )  # fmt: skip

    def repeat(self, times: int) -> Origin:
        """``times`` views (frames) like this one, one after the other."""
        step = torch.arange(times, device=self.index.device).repeat_interleave(self.n)
        view = torch.where(self.view.repeat(times) < 0, -1, step)
        weight = None if self.weight is None else self.weight.repeat(times, 1)
        index = self.index.repeat(times, 1) + step[:, None] * self.patches
        return Origin(index, weight, self.patches, view, self.place.repeat(times, 1), self.shape, None, times)

    def piece(self, start: int, length: int) -> tuple[Origin, tuple[int, ...]]:
        """Some tokens in a row, as an image of their own, and the views that they come from."""
        part = self.take(torch.arange(start, start + length, device=self.index.device))
        used = tuple(sorted({v for v in part.view.tolist() if v >= 0}))
        to = torch.full((self.views + 1,), -1, dtype=torch.long, device=part.view.device)
        to[list(used)] = torch.arange(len(used), device=part.view.device)
        view = to[part.view]
        shift = (part.view.clamp(min=0) - view.clamp(min=0)).unsqueeze(1) * self.patches
        whole = self.crops if len(used) == self.views else None
        return Origin(
            part.index - shift, part.weight, self.patches, view, part.place, self.shape, whole, len(used)
        ), used

    def seen(self) -> Tensor:
        """(K,) the tokens that stand for patches."""
        return (self.view >= 0).nonzero().flatten()

    def only(self, view: int) -> tuple[Tensor, Origin]:
        """The tokens (n,) of one view, and their origin as if it were the only one; crops keep their own grid."""
        where = (self.view == view).nonzero().flatten()
        mine = self.take(where)
        place = mine.place
        if self.crops is not None and view > 0:
            corner = torch.tensor(divmod(view - 1, self.crops[1]), device=place.device)
            place = place - corner * torch.tensor(self.shape, device=place.device)
        return where, Origin(
            mine.index - view * self.patches,
            mine.weight,
            self.patches,
            torch.zeros_like(mine.view),
            place,
            self.shape,
            count=1,
        )

    def map(self, t: Tensor) -> Tensor:
        """Patch tensors (B,views*patches,...) to tokens (B,N,...)."""
        if self.index.shape[1] == 1 and self.weight is None:
            return t[:, self.index[:, 0]]
        rows = t[:, self.index]
        if self.weight is None:
            return rows.mean(2) if rows.is_floating_point() else rows[:, :, 0]
        return (rows * self.weight.view(*self.weight.shape, *([1] * (rows.dim() - 3))).to(rows.dtype)).sum(2)

    def same(self, other: Origin) -> bool:
        """Whether tokens of two images come from the same places."""
        if self is other:
            return True
        if (self.patches, self.shape, self.crops) != (other.patches, other.shape, other.crops):
            return False
        if self.index.shape != other.index.shape or (self.weight is None) != (other.weight is None):
            return False
        equal = torch.equal(self.index, other.index) and torch.equal(self.view, other.view)
        return equal and (self.weight is None or torch.equal(self.weight, cast(Tensor, other.weight)))
