"""The videos of a prompt, from the runs of placeholders that their frames stand in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.adapters.language.families import Vision
from tokenreduce.core.evidence import Origin

__all__ = ["Image", "videos"]


@dataclass
class Image:
    """An image, tile, frame or video in a prompt, as one call of the vision tower gave it."""

    row: int
    #: (n,) columns of the prompt that its tokens stand in.
    columns: Tensor
    origin: Origin
    views: tuple[int, ...]
    kind: str
    rows: Tensor | None = None
    key: tuple[object, ...] = ()
    #: (n,) bool of the tokens that only repeat one that a method in the tower merged them into, None when none does.
    gone: Tensor | None = None
    size: Tensor | None = None
    #: Number of the image or video in the call that it, or a piece of it, comes from.
    entry: int = -1
    #: Number of its first token in that call.
    start: int = 0


def videos(found: Iterator[Image], kind: str, vision: Vision | None) -> Iterator[Image]:
    """The videos among images ``found`` in order of their places: one image each, frame by frame.

    Frames with text between them (timestamps) are joined again. Where a family has no videos of its own, or nobody
    knows (``vision`` is None), two or more images of one view and of one size in a prompt are a video; a single one is
    a picture, and is left out as all pictures are. So are the tiles of a picture, which stand side by side where
    pixels are shuffled (InternVL). Raises ``ValueError`` for a video in one piece of which nobody knows the frames.
    """
    if kind != "video" and vision is not None and vision.videos:
        return
    row: list[Image] = []
    for image in _without_tiles(list(found)) if vision is not None and vision.kind == "shuffled" else found:
        if row and (image.row != row[0].row or not _goes_on(row, image, kind)):
            yield from _video(row, kind)
            row = []
        row.append(image)
    yield from _video(row, kind)


def _without_tiles(found: list[Image]) -> list[Image]:
    """``found`` less those that stand side by side with another."""
    spans = [(i.row, int(i.columns[0]), int(i.columns[-1])) for i in found]
    starts, ends = {(r, s - 1) for r, s, _ in spans}, {(r, e + 1) for r, _, e in spans}
    return [i for i, (r, s, e) in zip(found, spans, strict=True) if (r, e) not in starts and (r, s) not in ends]


def _goes_on(row: list[Image], image: Image, kind: str) -> bool:
    """Whether ``image`` belongs to the video that the pieces ``row`` of it began."""
    first = row[0]
    if first.kind and kind == "video":  # pieces of one entry: their views go on, a whole one stands alone
        return first.entry == image.entry
    return first.origin.same(image.origin) and first.origin.views == image.origin.views == 1


def _video(row: list[Image], kind: str) -> Iterator[Image]:
    if not row:
        return
    first = row[0]
    if len(row) == 1:
        if kind == "video":
            if not first.kind:
                raise ValueError(
                    "the frames of a video are not known, because its features were made elsewhere; pass "
                    "pixel_values_videos, or make the features with the patched model's get_video_features"
                )
            yield replace(first, gone=None, size=None)
        return
    origin = _joined([i.origin for i in row])
    rows = None if first.rows is None else torch.cat([i.rows for i in row if i.rows is not None])
    views = tuple(v for i in row for v in i.views)
    key = ("video", kind, len(row), *first.key[:2])
    columns = torch.cat([i.columns for i in row])
    # What a method in the tower merged is there in full: frames have one size only then.
    yield Image(first.row, columns, origin, views, first.kind, rows, key, entry=first.entry)


def _joined(parts: list[Origin]) -> Origin:
    """The pieces of a video as one: their views are its frames."""
    first = parts[0]
    if all(p is first or p.same(first) for p in parts) and first.views == 1:
        return first.repeat(len(parts))
    starts = [sum(p.views for p in parts[:i]) for i in range(len(parts))]
    weight = None
    if any(p.weight is not None for p in parts):
        weight = torch.cat(
            [torch.full(p.index.shape, 1 / p.index.shape[1]) if p.weight is None else p.weight for p in parts]
        )
    return Origin(
        torch.cat([p.index + s * p.patches for p, s in zip(parts, starts, strict=True)]), weight, first.patches,
        torch.cat([torch.where(p.view < 0, -1, p.view + s) for p, s in zip(parts, starts, strict=True)]),
        torch.cat([p.place for p in parts]), first.shape, None, starts[-1] + parts[-1].views,
    )  # fmt: skip


def _shares(one: Origin) -> Tensor:
    even = torch.full(one.index.shape, 1 / one.index.shape[1], device=one.index.device)
    return even if one.weight is None else one.weight
