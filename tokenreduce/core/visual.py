"""Evidence between vision encoder and language model: the visual tokens of one image, and what the tower saw of them.

A tower works on patches, a language model on visual tokens; pooling, 2x2 merging, tiling and cutting off padding lie
between them. :class:`Visual` keeps both: its tokens are those of the language model, and :meth:`Evidence.per_token`
takes a score from the patches of a tower block to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tokenreduce.core.evidence import Evidence, Look, Rows
from tokenreduce.core.plan import Plan

__all__ = ["Mapped", "Origin", "Visual", "resolve"]


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


class Mapped(Evidence):
    """A tower block's evidence on the patches of all views (B*V,P+n,...), read as evidence on tokens (B,N,...).

    ``plan`` leads from the patches at the tower's entry to those that this block saw, where a method merged inside the
    tower. ``own`` (B,1,C) are class-token features; tokens then are the class token and the N visual ones.
    """

    def __init__(
        self, patches: Evidence, origin: Origin, x: Tensor, *, prefix: int = 0, plan: Plan | None = None
    ) -> None:
        super().__init__(
            x, protected=prefix, cls=patches.cls, rope=patches.rope, scale=patches._scale, layer=patches.layer,
            depth=patches.depth,
        )  # fmt: skip
        self.patches, self.origin, self.plan = patches, origin, plan

    def per_token(self, score: Callable[[Evidence], Tensor]) -> Tensor:
        return self.map(score(self.patches))

    def map(self, t: Tensor) -> Tensor:
        """(B*V,P+n,...) of the patches to (B,N,...) of the tokens, behind the class token where it is one of them."""
        if self.plan is not None:
            t = self.plan.expand(t)
        p, b = self.patches.prefix, self.batch
        body = t[:, p:]
        out = self.origin.map(body.reshape(b, -1, *body.shape[2:]))
        return out if not self.prefix else torch.cat([t[:, :1].reshape(b, -1, *t.shape[2:])[:, :1], out], 1)

    def _heads(self, t: Tensor) -> Tensor:
        return self.map(t.transpose(1, 2)).transpose(1, 2)

    @property
    def keys(self) -> Tensor:
        return self._heads(self.patches.keys)

    @property
    def queries(self) -> Tensor:
        return self._heads(self.patches.queries)

    @property
    def values(self) -> Tensor:
        return self._heads(self.patches.values)

    def attention(self, rows: Rows = "cls") -> Tensor:
        if not (isinstance(rows, str) and rows == "cls"):
            raise ValueError("tokens that are not patches have no attention rows of their own; use per_token(score)")
        a = self.patches.attention("cls")
        return self.map(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Visual(Evidence):
    """Evidence on the visual tokens of images, all made of the same places, at the entry of the language model.

    ``x`` (B,N,D) are their embeddings there, and :attr:`features` (B,N,C) what entered the projector. Methods with
    ``space = "vision"`` get the features as ``x``, behind the class token when they ask for it.

    Args:
        origin: where the tokens come from.
        features: (B,N,C) before the projector, None where tokens have none of their own (2x2 merging).
        own: (B*V,C) features of the class token of every view.
        blocks: tower block -> its evidence on patches, images and their views along the batch (B*V,P+n,...).
        plans: tower block -> plan from the patches at the entry to those it saw, where a method merged in there.
        feature, tower_depth: block whose output enters the projector, and number of blocks.
        text, text_valid: (B,M,D) embeddings of the question in the language model's space, (B,M) which are there.
        clip: ``(patches (B,N,E), text (B,M,E))`` in the joint space of a CLIP model, where a method asked for it; text
            rows that are not there are zero.
        projected: (B,N,D) embeddings behind the projector where ``x`` are others.
        pixels: (B*V,n,P) the pixels of every patch.
        pooled: ``(attention (B*V,n), vector (B*V,C))`` of the tower's pooling head.
    """

    def __init__(
        self,
        x: Tensor,
        origin: Origin,
        *,
        features: Tensor | None = None,
        own: Tensor | None = None,
        blocks: Mapping[int, Evidence] | None = None,
        plans: Mapping[int, Plan] | None = None,
        feature: int = -1,
        tower_depth: int = 0,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        clip: tuple[Tensor, Tensor] | None = None,
        projected: Tensor | None = None,
        size: Tensor | None = None,
        times: Tensor | None = None,
        prefix: int = 0,
        pixels: Tensor | None = None,
        pooled: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(x, protected=prefix, text=text, size=size, times=times, cls=False, pixels=pixels)
        self.origin, self._features, self.own = origin, features, own
        self.blocks, self.plans = dict(blocks or {}), dict(plans or {})
        self.feature, self.tower_depth = feature, tower_depth
        self.text_valid, self._clip = text_valid, clip
        #: Whether ``x`` are features before the projector.
        self.is_vision = False
        self._projected, self._pooled = projected, pooled
        self.cls = any(b.cls for b in self.blocks.values())
        self.crops = origin.crops

    @property
    def features(self) -> Tensor:
        return self.x if self._features is None else self._features

    @property
    def projected(self) -> Tensor:
        return super().projected if self._projected is None else self._projected

    @property
    def place(self) -> Tensor:
        return self.origin.place

    @property
    def shape(self) -> tuple[int, int]:
        return self.origin.shape

    @property
    def view(self) -> Tensor:
        return self.origin.view

    @property
    def frames(self) -> int:
        return self.origin.views

    def tower(self, look: Look = None) -> Evidence:
        if not self.blocks:
            return self
        block = resolve(look, self.tower_depth, self.feature)
        if block not in self.blocks:
            raise ValueError(
                f"this method looks at layer {look} of the vision encoder, which the evidence lacks: let the method's "
                f"looks() name it"
            )
        return Mapped(self.blocks[block], self.origin, self.x, prefix=self.prefix, plan=self.plans.get(block))

    def per_token(self, score: Callable[[Evidence], Tensor]) -> Tensor:
        return self.tower().per_token(score) if self.blocks else super().per_token(score)

    def of_pixels(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = self._need(self._pixels, "pixels")
        made = score(pixels.view(self.batch, -1, *pixels.shape[1:]))
        return self.origin.map(made.flatten(1))

    def pooling(self) -> tuple[Tensor, Tensor] | None:
        if self._pooled is None:
            return None
        attention, vector = (t.view(self.batch, -1, t.shape[-1]) for t in self._pooled)
        return self.origin.map(attention.flatten(1)), vector

    @property
    def keys(self) -> Tensor:
        return self.tower().keys if self.blocks else super().keys

    @property
    def queries(self) -> Tensor:
        return self.tower().queries if self.blocks else super().queries

    def attention(self, rows: Rows = "cls") -> Tensor:
        return self.tower().attention(rows) if self.blocks else super().attention(rows)

    # -- views -------------------------------------------------------------------------------------------------------
    def parts(self) -> list[tuple[Tensor, Visual]]:
        """The views one by one: their tokens (n,), and their evidence as if each were an image of its own.

        Views that are made of the same places come together, with tokens (V,n) and evidence on a batch of B*V.
        """
        v = self.origin.views
        if v == 1 and bool((self.view == 0).all()):
            return [(torch.arange(self.n - self.prefix, device=self.x.device)[None], self)]
        alone = [self.origin.only(i) for i in range(v)]
        first = alone[0][1]
        if all(o.same(first) for _, o in alone[1:]):
            where = torch.stack([w for w, _ in alone])
            return [(where, self._part(where, first, None))]
        return [(w[None], self._part(w[None], o, i)) for i, (w, o) in enumerate(alone) if len(w)]

    def _part(self, where: Tensor, origin: Origin, view: int | None) -> Visual:
        b, v, many = self.batch, self.origin.views, len(where)

        def tokens(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, where].flatten(0, 1)

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.repeat_interleave(many, 0)

        def mine(t: Tensor) -> Tensor:
            return t if view is None else t.view(b, v, *t.shape[1:])[:, view]

        x = tokens(self.x)
        assert x is not None
        clip = None if self._clip is None else (tokens(self._clip[0]), rows(self._clip[1]))
        return Visual(
            x,
            origin,
            features=tokens(self._features),
            own=None if self.own is None else mine(self.own),
            blocks={i: e if view is None else e.batch_rows(torch.arange(b, device=x.device) * v + view)
                    for i, e in self.blocks.items()},
            plans={i: p if view is None else p.rows_at(torch.arange(b, device=x.device) * v + view)
                   for i, p in self.plans.items()},
            feature=self.feature,
            tower_depth=self.tower_depth,
            text=rows(self.text),
            text_valid=rows(self.text_valid),
            clip=cast(Any, clip),
            projected=tokens(self._projected),
            size=tokens(self.size),
            times=tokens(self.times),
            pixels=None if self._pixels is None else mine(self._pixels),
            pooled=None if self._pooled is None else (mine(self._pooled[0]), mine(self._pooled[1])),
        )  # fmt: skip

    def batch_of(self, rows: Tensor) -> Visual:
        """The same evidence for some samples of the batch of one view, ``rows`` (R,)."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        clip = None if self._clip is None else (self._clip[0][rows], self._clip[1][rows])
        return Visual(
            self.x[rows], self.origin, features=pick(self._features), own=pick(self.own),
            blocks={i: e.batch_rows(rows) for i, e in self.blocks.items()},
            plans={i: p.rows_at(rows) for i, p in self.plans.items()}, feature=self.feature,
            tower_depth=self.tower_depth, text=pick(self.text), text_valid=pick(self.text_valid), clip=clip,
            projected=pick(self._projected), size=pick(self.size), times=pick(self.times), prefix=self.prefix,
            pixels=pick(self._pixels),
            pooled=None if self._pooled is None else (self._pooled[0][rows], self._pooled[1][rows]),
        )  # fmt: skip

    # -- spaces ------------------------------------------------------------------------------------------------------
    def in_vision(self, with_class: bool) -> Visual:
        """The same evidence with the features before the projector as ``x``; ``with_class``: behind the class token of
        the view, where the tower has one (only for evidence of one view)."""
        if self._features is None:
            return self
        x, prefix, size = self._features, 0, self.size
        if with_class and self.own is not None and self.origin.views == 1:
            x, prefix = torch.cat([self.own[:, None].to(x), x], 1), 1
            size = None if size is None else torch.cat([torch.ones_like(size[:, :1]), size], 1)
        out = Visual(
            x, self.origin, features=x, own=self.own, blocks=self.blocks, plans=self.plans, feature=self.feature,
            tower_depth=self.tower_depth, text=self.text, text_valid=self.text_valid, clip=self._clip, size=size,
            projected=self.projected, times=self.times, prefix=prefix, pixels=self._pixels, pooled=self._pooled,
        )  # fmt: skip
        out.is_vision = True
        return out
