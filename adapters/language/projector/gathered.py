"""Evidence of images that are alike, at the entry of the language model: from the prompt's embeddings, and from what
the vision tower saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Views
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.projector.brought import brought_in
from tokenreduce.adapters.language.projector.questions import ClipQuestion, Question
from tokenreduce.adapters.language.projector.seen import Encoded
from tokenreduce.adapters.language.projector.through import entering, projection
from tokenreduce.adapters.language.projector.videos import Image
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import ImageEvidence, Joint, Through

__all__ = ["Dropped", "Gathering", "Group"]


@dataclass(frozen=True, eq=False)
class Group:
    """Images that are alike: where the tokens that a method sees stand, and evidence of them."""

    views: Views
    evidence: ImageEvidence


@dataclass(frozen=True, eq=False)
class Dropped:
    """Columns (G,M) that go whatever a method chooses, in ``rows`` (G,1): row ends, and copies of merged tokens."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Gathering:
    """What evidence for ``reducer`` is made from: a prompt's embeddings ``x`` (B,L,D), and its question."""

    forward: Forward
    x: Tensor
    reducer: Projector
    text: Question | None = None
    clip: ClipQuestion | None = None

    def group(self, alike: list[Image], dropped: list[Dropped]) -> Group | None:
        """Images that are ``alike``; what goes anyway is put on ``dropped``. None where no token of theirs is left, as
        in a frame that a method in the tower merged into others."""
        first, device = alike[0], self.x.device
        rows = torch.tensor([i.row for i in alike], device=device)[:, None]
        columns = torch.stack([i.columns for i in alike])
        gone = self._gone(first)
        if bool(gone.any()):
            dropped.append(Dropped(rows, columns[:, gone]))
        seen = self._seen(first)
        if not len(seen):
            return None
        views = Views(rows, columns[:, seen])
        return Group(views, self._evidence(alike, views, seen))

    def _gone(self, first: Image) -> Tensor:
        """(n,) bool of the tokens of an image that go."""
        device, origin = self.x.device, first.origin
        gone = torch.zeros(origin.n, dtype=torch.bool, device=device) if first.gone is None else first.gone
        return gone | (origin.view < 0) if self.reducer.newlines == "drop" else gone

    def _seen(self, first: Image) -> Tensor:
        """(N,) the tokens of an image that the method sees."""
        device, origin = self.x.device, first.origin
        ranked = self.reducer.newlines == "rank"
        seen = torch.arange(origin.n, device=device) if ranked else origin.seen().to(device)
        return seen if first.gone is None else seen[~first.gone[seen]]

    def _evidence(self, alike: list[Image], views: Views, seen: Tensor) -> ImageEvidence:
        first, batch = alike[0], views.rows[:, 0]
        own = first.origin if len(seen) == first.origin.n else first.origin.take(seen)
        encoded = brought_in(self.forward).encoded.get(first.kind)
        more: dict[str, Any] = {} if encoded is None else self._of_tower(encoded, alike, seen)
        if self.clip is not None:
            if more.get("features") is None:
                raise ValueError(
                    f"{self.reducer.name} with clip compares patches before the projector with the question, and these "
                    f"tokens are made of several patches each; set clip=None"
                )
            more["clip"] = Joint(self.clip.space.patches(more["features"]), self.clip.x[batch])
        if self.text is not None:
            more["text"], more["text_valid"] = self.text.x[batch], self.text.there[batch]
        if first.gone is not None and first.size is not None:
            more["size"] = first.size[seen][None]
        return ImageEvidence(views.embeddings(self.x), own, **more)

    def _of_tower(self, encoded: Encoded, alike: list[Image], seen: Tensor) -> dict[str, Any]:
        """What the tower saw of the tokens ``seen`` (N,), as arguments of the evidence."""
        first, device = alike[0], self.x.device
        views = torch.tensor([i.views for i in alike], device=device).flatten()
        blocks = {b: encoded.evidence(b, views) for b in encoded.blocks}
        merged = {b: shares for b in encoded.blocks if (shares := encoded.shares(b, views)) is not None}
        plans = {b: plan for b in encoded.blocks if (plan := encoded.plan_at(b, views)) is not None}
        out: dict[str, Any] = {
            "blocks": blocks, "plans": plans, "feature": encoded.vision.feature, "tower_depth": encoded.vision.depth,
            "merged": merged, "segments": encoded.segments(views),
        }  # fmt: skip
        if encoded.features is not None and first.rows is not None:
            flat = encoded.features.flatten(0, 1)
            at = torch.stack([_rows_of(i) for i in alike]).to(device)[:, seen]
            out["features"] = flat.index_select(0, at.flatten()).view(*at.shape, -1)
        if encoded.own is not None:
            out["own"] = encoded.own[views]
        if encoded.given is not None:
            out["pixels"] = encoded.pixels(views)
        if encoded.entered is not None:
            table = entering(encoded)
            at = torch.stack([_entered(i, encoded, table) for i in alike]).to(device)[:, seen]
            out["through"] = Through(table[at.to(table.device)].to(device), projection(encoded.vision))
        if encoded.pooled is not None:
            out["pooled"] = encoded.pooled.cut(lambda t: t[views])
        return out


def _rows_of(image: Image) -> Tensor:
    """(N,) rows of an image's tokens among what entered the projector."""
    assert image.rows is not None
    return image.rows.clamp(min=0)


def _entered(image: Image, encoded: Encoded, table: Tensor) -> Tensor:
    """(N,) rows of an image's tokens in ``table`` (M,E), what entered the projector."""
    if image.rows is not None:
        return _rows_of(image)
    if len(table) != encoded.tokens:
        raise ValueError(
            f"a method asks how the projector makes every token, and here {len(table)} rows that enter it become "
            f"{encoded.tokens} tokens, pooled behind it; choose another method"
        )
    return image.start + torch.arange(image.origin.n)
