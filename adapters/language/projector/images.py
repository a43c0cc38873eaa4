"""The images of a prompt, at the entry of the language model: which columns are theirs, and evidence of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.projector.brought import brought_in
from tokenreduce.adapters.language.projector.gathered import Dropped, Gathering, Group
from tokenreduce.adapters.language.projector.questions import clip_question, embedded_question
from tokenreduce.adapters.language.projector.seen import Encoded
from tokenreduce.adapters.language.projector.videos import Image, videos
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.temporal import Temporal
from tokenreduce.algorithms.views import ranks
from tokenreduce.core.evidence import Origin

__all__ = ["Images", "found_in", "frames_in", "places_in", "runs"]


@dataclass(frozen=True, eq=False)
class Images:
    """What a method sees of a prompt: images in ``groups`` of alike ones, and columns that go in any case."""

    groups: list[Group] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def keep_out(self, stay: Tensor) -> None:
        """Mark in ``stay`` (B,L), in place, what goes in any case."""
        for gone in self.dropped:
            stay[gone.rows, gone.columns] = False


@dataclass(frozen=True, eq=False)
class Runs:
    """Maximal runs of tokens, in order: the ``row`` (R,), first column and ``length`` of each."""

    row: Tensor
    start: Tensor
    length: Tensor

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.row.tolist(), self.start.tolist(), self.length.tolist(), strict=True)


def runs(visual: Tensor, starts: Tensor | None = None) -> Runs:
    """The runs in ``visual`` (B,L); ``starts`` (B,L) marks tokens that begin a new one where two stand side by side."""
    edge = visual.new_zeros(visual.shape[0], 1)
    before = torch.cat([edge, visual[:, :-1]], 1)
    first = visual & ~before
    if starts is not None:
        first = first | (visual & starts)
    after = torch.cat([first[:, 1:] | ~visual[:, 1:], ~edge], 1)
    row, start = first.nonzero(as_tuple=True)
    end = (visual & after).nonzero(as_tuple=True)[1]
    return Runs(row, start, end - start + 1)


def found_in(forward: Forward, x: Tensor, reducer: Projector, source: str = "") -> Images:
    """The images of a prompt, alike ones together. ``x`` (B,L,D) are the embeddings; ``source`` is where the language
    model's tokenizer can be loaded from, for methods that show the question to a CLIP model.

    Raises ``ValueError`` where the method needs evidence of a tower, and the features were made elsewhere.
    """
    text = embedded_question(forward, x) if "text" in reducer.required() else None
    clip = clip_question(forward, reducer, source, x.device) if "clip" in reducer.required() else None
    gathering, out = Gathering(forward, x, reducer, text, clip), Images()
    found = list(_images(forward, x, reducer))
    while found:
        alike = [i for i in found if i.key == found[0].key and i.origin.same(found[0].origin)]
        found = [i for i in found if not any(i is a for a in alike)]
        if (group := gathering.group(alike, out.dropped)) is not None:
            out.groups.append(group)
    return out


class _Frames(Temporal):
    """Stands for a method that wants to know frames and nothing else."""


def frames_in(forward: Forward, x: Tensor) -> Tensor:
    """(B,L,4) for every column of the prompt the number of the video in its row, its frame (twice, the first and the
    last that it stands for), and its place within the frame; -1 for what is of no video."""
    out = torch.full((*x.shape[:2], 4), -1, dtype=torch.long, device=x.device)
    number = dict.fromkeys(range(len(x)), 0)
    for video in _images(forward, x, _Frames()):
        view = video.origin.view.to(x.device)
        place = ranks(torch.zeros(1, len(view), device=x.device), view)[0]
        what = torch.stack([torch.full_like(view, number[video.row]), view, view, place], 1)
        number[video.row] += 1
        out[video.row, video.columns] = torch.where(view.unsqueeze(1) < 0, -1, what)
    return out


def places_in(forward: Forward, x: Tensor) -> Tensor:
    """(B,L,6) for every column of the prompt what ``place_of`` of
    :class:`~tokenreduce.core.evidence.LanguageEvidence` says; -1 for what is of no image."""
    out = torch.full((*x.shape[:2], 6), -1, dtype=torch.long, device=x.device)
    number = dict.fromkeys(range(len(x)), 0)
    for image in sorted(_images(forward, x, Projector()), key=lambda i: int(i.columns[0])):
        view, n = image.origin.view.to(x.device), image.origin.n
        plane = view if image.origin.crops is None else view.clamp(max=1)
        what = torch.cat([
            torch.stack([torch.full_like(view, number[image.row]), plane], 1), image.origin.place.to(x.device),
            torch.stack([torch.arange(n, device=x.device), torch.full_like(view, n)], 1),
        ], 1)  # fmt: skip
        number[image.row] += 1
        out[image.row, image.columns] = torch.where(view.unsqueeze(1) < 0, -1, what)
    return out


def _images(forward: Forward, x: Tensor, reducer: Projector) -> Iterator[Image]:
    brought, visual = brought_in(forward), forward.columns.visual
    needy = (
        bool(reducer.tower_blocks())
        or reducer.space == "vision"
        or not {"head", "pixels", "through"}.isdisjoint(reducer.required())
    )
    joined = videos if reducer.temporal else _as_they_are
    seen_columns = torch.zeros_like(visual)
    for kind, encoded in brought.encoded.items():
        here = brought.kinds.get(kind)
        if here is None or not encoded.entries:
            continue
        here = here & visual
        seen_columns |= here
        # A call of its own ("video 0") is of the kind that it begins with.
        found = _encoded(here, encoded, kind, brought.places.get(kind))
        yield from joined(found, kind.partition(" ")[0], encoded.vision)
    rest = visual & ~seen_columns
    if not bool(rest.any()):
        return
    if needy:
        raise ValueError(
            f"{reducer.name} looks at what the vision tower saw, but the image features of this call were made "
            f"elsewhere; pass pixel_values, or make the features with the patched model's get_image_features. An "
            f"assistant gets those of the model that it drafts for: patch that one with {reducer.name}:keep=1.0, which "
            f"drops nothing there"
        )
    for kind, here in brought.kinds.items():
        if bool((mine := here & rest).any()):
            yield from joined(_plain(mine, x, brought.newline, reducer), kind.partition(" ")[0], None)


def _as_they_are(found: Iterator[Image], kind: str, vision: Any) -> Iterator[Image]:
    return found


def _plain(visual: Tensor, x: Tensor, newline: Tensor | None, reducer: Projector) -> Iterator[Image]:
    """Images of which only the embeddings are known."""
    ends = None
    if newline is not None and reducer.newlines != "rank":
        ends = visual & (x == newline.to(x)).all(-1)
    for r, s, n in runs(visual):
        view = torch.zeros(n, dtype=torch.long, device=visual.device)
        if ends is not None:
            view = torch.where(ends[r, s : s + n], -1, view)
        at = torch.arange(n, device=visual.device)
        place = torch.stack([torch.zeros_like(at), at], 1)
        origin = Origin(at[:, None], None, n, view, place, (1, n), count=1)
        yield Image(r, s + at, origin, (0,), "", None, ("", n))


def _numbers(here: Tensor, encoded: Encoded, kind: str) -> Tensor:
    """(B,L) which feature of a call of the tower the columns ``here`` hold: in order, once for every beam; else -1."""
    total, columns = encoded.tokens, int(here.sum())
    if total == 0 or columns % total:
        raise ValueError(f"{columns} placeholder tokens for {total} {kind} features of the vision tower")
    times = columns // total
    number = torch.full(here.shape, -1, dtype=torch.long, device=here.device)
    order = torch.arange(columns, device=here.device)
    if times > 1:  # rows b*times .. of beams hold the same images
        alone = here[::times]
        mine = torch.full(alone.shape, -1, dtype=torch.long, device=here.device)
        mine[alone] = order[:total]
        return mine.repeat_interleave(times, 0)
    number[here] = order
    return number


def _encoded(here: Tensor, encoded: Encoded, kind: str, place: Tensor | None) -> Iterator[Image]:
    """Images of one call of the tower, whose tokens are in the columns ``here`` (B,L); ``place`` (B,L) says which token
    each column holds, where that is known."""
    number = _numbers(here, encoded, kind) if place is None else torch.where(here, place, -1)
    bounds = torch.tensor([0, *[e.origin.n for e in encoded.entries]], device=here.device).cumsum(0)
    starts = torch.isin(number, bounds)
    for r, s, n in runs(here, starts):
        first = int(number[r, s])
        e = int(torch.searchsorted(bounds, torch.tensor(first, device=bounds.device), right=True)) - 1
        entry = encoded.entries[e]
        offset = first - int(bounds[e])
        origin, rows = entry.origin, entry.rows
        views = tuple(range(entry.first, entry.first + origin.views))
        if n < origin.n:  # a tile or a frame, text around it
            origin, used = origin.piece(offset, n)
            views = tuple(views[v] for v in used)
            rows = None if rows is None else rows[offset : offset + n]
        key: tuple[object, ...] = (kind, n, offset if n < entry.origin.n else 0, rows is None)
        columns, copies = s + torch.arange(n, device=here.device), _copies(encoded, origin, views)
        if copies.gone is not None:
            key = (*key, r, s)  # other tokens are left in every image
        yield Image(r, columns, origin, views, kind, rows, key, copies.gone, copies.size, e, first)


@dataclass(frozen=True, eq=False)
class _Copies:
    """What a method in the tower made of an image: tokens (n,) bool that are copies of another, and sizes (n,)."""

    gone: Tensor | None = None
    size: Tensor | None = None


def _copies(encoded: Encoded, origin: Origin, views: tuple[int, ...]) -> _Copies:
    at = torch.tensor(views, device=origin.index.device)
    left = encoded.left(at)
    if left is None:
        return _Copies()
    here = left.flatten()[origin.index]
    if origin.weight is not None:
        here = here & (origin.weight > 0)
    gone = ~here.any(1) & (origin.view >= 0)
    number = encoded.sizes(at)
    return _Copies(gone, None if number is None else origin.map(number.reshape(1, -1))[0])
