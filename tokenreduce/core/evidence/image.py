"""Evidence on the visual tokens of images, and what the vision tower saw of them.

A tower works on patches, a language model on visual tokens; pooling, 2x2 merging, tiling and cutting off padding lie
between them. :class:`ImageEvidence` keeps both: its tokens are those of the language model, and
:meth:`ImageEvidence.per_token` takes a score from the patches of a tower block to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenreduce.core.evidence.attention import Attention, Rows, need
from tokenreduce.core.evidence.base import BaseEvidence
from tokenreduce.core.evidence.origin import Look, Origin, resolve
from tokenreduce.core.evidence.pairs import Joint, PoolingHead, Through
from tokenreduce.core.evidence.visual import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["ImageEvidence", "TowerEvidence"]


class _OfTokens(Attention):
    """The attention of a tower's patches, read as that of the tokens made of them."""

    def __init__(self, patches: Attention, to_tokens: Callable[[Tensor], Tensor]) -> None:
        super().__init__(rope=patches.rope, scale=patches.scale, cls=patches.cls)
        self._patches, self._to_tokens = patches, to_tokens

    def _heads(self, t: Tensor) -> Tensor:
        return self._to_tokens(t.transpose(1, 2)).transpose(1, 2)

    @property
    def keys(self) -> Tensor:
        return self._heads(self._patches.keys)

    @property
    def queries(self) -> Tensor:
        return self._heads(self._patches.queries)

    @property
    def values(self) -> Tensor:
        return self._heads(self._patches.values)

    def __call__(self, rows: Rows = "cls") -> Tensor:
        if not (isinstance(rows, str) and rows == "cls"):
            raise ValueError("tokens that are not patches have no attention rows of their own; use per_token(score)")
        return self._to_tokens(self._patches("cls").permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TowerEvidence(VisualEvidence):
    """A tower block's evidence on the patches of all views (B*V,P+n,...), read as evidence on tokens (B,N,...).

    ``plan`` leads from the patches at the tower's entry to those that this block saw, where a method merged inside the
    tower; ``frames`` (B,V,V) are the shares of all frames in each, where one merged them behind this block. With a
    ``prefix`` the tokens are the class token and the N visual ones.
    """

    def __init__(
        self, patches: BaseEvidence, origin: Origin, x: Tensor, *, prefix: int = 0, plan: Plan | None = None,
        frames: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            x, _OfTokens(patches.attention, self.map), protected=prefix, cls=patches.cls, layer=patches.layer,
            depth=patches.depth,
        )  # fmt: skip
        self.patches, self.origin, self.plan, self._shares = patches, origin, plan, frames

    def per_token(self, score: Callable[[Any], Tensor]) -> Tensor:
        """``score`` (B*V,P+n,...) of the patches, taken to the tokens (B,N,...)."""
        return self.map(score(self.patches))

    def map(self, t: Tensor) -> Tensor:
        """(B*V,P+n,...) of the patches to (B,N,...) of the tokens, behind the class token where it is one of them."""
        if self.plan is not None:
            t = self.plan.expand(t)
        p, b = self.patches.prefix, self.batch
        if self._shares is not None:
            t = (self._shares.to(t.dtype) @ t.reshape(b, self._shares.shape[1], -1)).view(t.shape)
        body = t[:, p:]
        out = self.origin.map(body.reshape(b, -1, *body.shape[2:]))
        return out if not self.prefix else torch.cat([t[:, :1].reshape(b, -1, *t.shape[2:])[:, :1], out], 1)


class ImageEvidence(VisualEvidence):
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
        through: see :class:`VisualEvidence`.
        pooled: ``(attention (B*V,n), vector (B*V,C))`` of the tower's pooling head.
        is_vision: whether ``x`` are features before the projector.
        segments: see :class:`VisualEvidence`.
        merged: tower block -> (B,V,V) shares of all frames in each, where a method merged frames behind that block.
    """

    def __init__(
        self,
        x: Tensor,
        origin: Origin,
        *,
        features: Tensor | None = None,
        own: Tensor | None = None,
        blocks: Mapping[int, BaseEvidence] | None = None,
        plans: Mapping[int, Plan] | None = None,
        feature: int = -1,
        tower_depth: int = 0,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        clip: Joint | tuple[Tensor, Tensor] | None = None,
        projected: Tensor | None = None,
        size: Tensor | None = None,
        times: Tensor | None = None,
        prefix: int = 0,
        pixels: Tensor | None = None,
        pooled: PoolingHead | tuple[Tensor, Tensor] | None = None,
        is_vision: bool = False,
        through: Through | tuple[Tensor, Callable[[Tensor], Tensor]] | None = None,
        segments: Tensor | None = None,
        merged: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.blocks, self.plans, self.merged = dict(blocks or {}), dict(plans or {}), dict(merged or {})
        super().__init__(
            x, protected=prefix, text=text, text_valid=text_valid, size=size, times=times, pixels=pixels, clip=clip,
            through=through, segments=segments,
            crops=origin.crops, cls=any(b.cls for b in self.blocks.values()),
        )  # fmt: skip
        self.origin, self._features, self.own = origin, features, own
        self.feature, self.tower_depth, self.is_vision = feature, tower_depth, is_vision
        self._projected = projected
        self._pooled = None if pooled is None else PoolingHead(*pooled)

    @property
    def features(self) -> Tensor:
        return self.x if self._features is None else self._features

    @property
    def projected(self) -> Tensor:
        return self.x[:, self.prefix :] if self._projected is None else self._projected

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

    def tower(self, look: Look = None) -> VisualEvidence:
        return self._block(look) if self.blocks else self

    def _block(self, look: Look) -> TowerEvidence:
        block = resolve(look, self.tower_depth, self.feature)
        if block not in self.blocks:
            raise ValueError(
                f"this method looks at layer {look} of the vision encoder, which the evidence lacks: let the method's "
                f"tower_blocks() name it"
            )
        return TowerEvidence(
            self.blocks[block], self.origin, self.x, prefix=self.prefix, plan=self.plans.get(block),
            frames=self.merged.get(block),
        )  # fmt: skip

    def per_token(self, score: Callable[[Any], Tensor]) -> Tensor:
        return self._block(None).per_token(score) if self.blocks else super().per_token(score)

    def of_pixels(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = need(self._pixels, "pixels")
        made = score(pixels.view(self.batch, -1, *pixels.shape[1:]))
        return self.origin.map(made.flatten(1))

    def pooling(self) -> tuple[Tensor, Tensor] | None:
        if self._pooled is None:
            return None
        attention, vector = (t.view(self.batch, -1, t.shape[-1]) for t in self._pooled)
        return self.origin.map(attention.flatten(1)), vector

    @property
    def attention(self) -> Attention:
        """That of the block whose output enters the projector."""
        return self.tower().attention if self.blocks else self._attention

    # -- views -------------------------------------------------------------------------------------------------------
    def parts(self) -> list[tuple[Tensor, ImageEvidence]]:
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

    def _part(self, where: Tensor, origin: Origin, view: int | None) -> ImageEvidence:
        b, v, many = self.batch, self.origin.views, len(where)

        def here(t: Tensor) -> Tensor:
            return t[:, where].flatten(0, 1)

        def many_rows(t: Tensor) -> Tensor:
            return t.repeat_interleave(many, 0)

        def tokens(t: Tensor | None) -> Tensor | None:
            return None if t is None else here(t)

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else many_rows(t)

        def mine(t: Tensor) -> Tensor:
            return t if view is None else t.view(b, v, *t.shape[1:])[:, view]

        return ImageEvidence(
            here(self.x),
            origin,
            features=tokens(self._features),
            own=None if self.own is None else mine(self.own),
            blocks={i: e if view is None else e.samples(torch.arange(b, device=where.device) * v + view)
                    for i, e in self.blocks.items()},
            plans={i: p if view is None else p.rows_at(torch.arange(b, device=where.device) * v + view)
                   for i, p in self.plans.items()},
            feature=self.feature,
            tower_depth=self.tower_depth,
            text=rows(self.text),
            text_valid=rows(self.text_valid),
            clip=None if self._clip is None else self._clip.cut(here, many_rows),
            projected=tokens(self._projected),
            size=tokens(self.size),
            times=tokens(self.times),
            pixels=None if self._pixels is None else mine(self._pixels),
            pooled=None if self._pooled is None else self._pooled.cut(mine),
            through=None if self._through is None else self._through.cut(here),
        )  # fmt: skip

    def batch_of(self, rows: Tensor) -> ImageEvidence:
        """The same evidence for some samples of the batch of one view, ``rows`` (R,)."""

        def some(t: Tensor) -> Tensor:
            return t[rows]

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else some(t)

        clip = None if self._clip is None else self._clip.cut(some, some)
        return ImageEvidence(
            self.x[rows], self.origin, features=pick(self._features), own=pick(self.own),
            blocks={i: e.samples(rows) for i, e in self.blocks.items()},
            plans={i: p.rows_at(rows) for i, p in self.plans.items()}, feature=self.feature,
            tower_depth=self.tower_depth, text=pick(self.text), text_valid=pick(self.text_valid), clip=clip,
            projected=pick(self._projected), size=pick(self.size), times=pick(self.times), prefix=self.prefix,
            pixels=pick(self._pixels), segments=pick(self._segments),
            merged={i: some(shares) for i, shares in self.merged.items()},
            pooled=None if self._pooled is None else self._pooled.cut(some),
            through=None if self._through is None else self._through.cut(some),
        )  # fmt: skip

    # -- spaces ------------------------------------------------------------------------------------------------------
    def in_vision(self, with_class: bool) -> ImageEvidence:
        """The same evidence with the features before the projector as ``x``; ``with_class``: behind the class token of
        the view, where the tower has one (only for evidence of one view)."""
        if self._features is None:
            return self
        x, prefix, size = self._features, 0, self.size
        if with_class and self.own is not None and self.origin.views == 1:
            x, prefix = torch.cat([self.own[:, None].to(x), x], 1), 1
            size = None if size is None else torch.cat([torch.ones_like(size[:, :1]), size], 1)
        return ImageEvidence(
            x, self.origin, features=x, own=self.own, blocks=self.blocks, plans=self.plans, feature=self.feature,
            tower_depth=self.tower_depth, text=self.text, text_valid=self.text_valid, clip=self._clip, size=size,
            projected=self.projected, times=self.times, prefix=prefix, pixels=self._pixels, pooled=self._pooled,
            is_vision=True, through=self._through, segments=self._segments, merged=self.merged,
        )  # fmt: skip
