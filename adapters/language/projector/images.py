"""The images of a prompt, at the entry of the language model: which columns are theirs, and evidence of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Step
from tokenreduce.adapters.language.projector.clip_text import JointSpace, joint_space, question_texts
from tokenreduce.adapters.language.projector.seen import Encoded
from tokenreduce.adapters.language.projector.through import entering, projection
from tokenreduce.adapters.language.projector.videos import Image, films
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.sequence import question
from tokenreduce.algorithms.temporal import Temporal
from tokenreduce.algorithms.views import ranks
from tokenreduce.core.evidence import ImageEvidence, Origin

__all__ = ["Group", "film_places", "groups", "image_places", "runs", "take_rows", "tokenizer_of"]


@dataclass
class Group:
    """Images that are alike: ``rows`` (G,1) and ``columns`` (G,N) of the tokens that a method sees, and evidence."""

    rows: Tensor
    columns: Tensor
    evidence: ImageEvidence


def runs(visual: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first column and length of every maximal run in ``visual`` (B,L), in order; ``starts`` (B,L) marks tokens
    that begin a new one where two stand side by side."""
    edge = visual.new_zeros(visual.shape[0], 1)
    before = torch.cat([edge, visual[:, :-1]], 1)
    first = visual & ~before
    if starts is not None:
        first = first | (visual & starts)
    after = torch.cat([first[:, 1:] | ~visual[:, 1:], ~edge], 1)
    row, start = first.nonzero(as_tuple=True)
    end = (visual & after).nonzero(as_tuple=True)[1]
    return row, start, end - start + 1


def groups(step: Step, x: Tensor, reducer: Projector, source: str = "") -> list[Group]:
    """The images of a prompt, alike ones together. ``x`` (B,L,D) are the embeddings; ``source`` is where the language
    model's tokenizer can be loaded from, for methods that show the question to a CLIP model.

    Raises ``ValueError`` where the method needs evidence of a tower, and the features were made elsewhere.
    """
    text = _question(step, x) if "text" in reducer.required() else None
    said = _said(step, reducer, source, x) if "clip" in reducer.required() else None
    found = list(_images(step, x, reducer))
    out: list[Group] = []
    while found:
        alike = [i for i in found if i.key == found[0].key and i.origin.same(found[0].origin)]
        found = [i for i in found if not any(i is a for a in alike)]
        if (group := _group(alike, step, x, reducer, text, said)) is not None:
            out.append(group)
    return out


class _Frames(Temporal):
    """Stands for a method that wants to know frames and nothing else."""


def film_places(step: Step, x: Tensor) -> Tensor:
    """(B,L,4) for every column of the prompt the number of the video in its row, its frame (twice, the first and the
    last that it stands for), and its place within the frame; -1 for what is of no video."""
    out = torch.full((*x.shape[:2], 4), -1, dtype=torch.long, device=x.device)
    number = dict.fromkeys(range(len(x)), 0)
    for film in _images(step, x, _Frames()):
        view = film.origin.view.to(x.device)
        place = ranks(torch.zeros(1, len(view), device=x.device), view)[0]
        what = torch.stack([torch.full_like(view, number[film.row]), view, view, place], 1)
        number[film.row] += 1
        out[film.row, film.columns] = torch.where(view.unsqueeze(1) < 0, -1, what)
    return out


def image_places(step: Step, x: Tensor) -> Tensor:
    """(B,L,6) for every column of the prompt what ``place_of`` of
    :class:`~tokenreduce.core.evidence.LanguageEvidence` says; -1 for what is of no image."""
    out = torch.full((*x.shape[:2], 6), -1, dtype=torch.long, device=x.device)
    number = dict.fromkeys(range(len(x)), 0)
    for image in sorted(_images(step, x, Projector()), key=lambda i: int(i.columns[0])):
        view, n = image.origin.view.to(x.device), image.origin.n
        plane = view if image.origin.crops is None else view.clamp(max=1)
        what = torch.cat([
            torch.stack([torch.full_like(view, number[image.row]), plane], 1), image.origin.place.to(x.device),
            torch.stack([torch.arange(n, device=x.device), torch.full_like(view, n)], 1),
        ], 1)  # fmt: skip
        number[image.row] += 1
        out[image.row, image.columns] = torch.where(view.unsqueeze(1) < 0, -1, what)
    return out


def _images(step: Step, x: Tensor, reducer: Projector) -> Iterator[Image]:
    run = step.run
    needy = (
        bool(reducer.tower_blocks())
        or reducer.space == "vision"
        or not {"head", "pixels", "through"}.isdisjoint(reducer.required())
    )
    joined = films if reducer.temporal else _as_they_are
    seen_columns = torch.zeros_like(run.visual)
    for kind, encoded in step.encoded.items():
        here = step.kinds.get(kind)
        if here is None or not encoded.entries:
            continue
        here = here & run.visual
        seen_columns |= here
        # A call of its own ("video 0") is of the kind that it begins with.
        yield from joined(_encoded(here, encoded, kind, step.places.get(kind)), kind.partition(" ")[0], encoded.vision)
    rest = run.visual & ~seen_columns
    if not bool(rest.any()):
        return
    if needy:
        raise ValueError(
            f"{reducer.name} looks at what the vision tower saw, but the image features of this call were made "
            f"elsewhere; pass pixel_values, or make the features with the patched model's get_image_features. An "
            f"assistant gets those of the model that it drafts for: patch that one with {reducer.name}:keep=1.0, which "
            f"drops nothing there"
        )
    for kind, here in step.kinds.items():
        if bool((mine := here & rest).any()):
            yield from joined(_plain(mine, x, step, reducer), kind.partition(" ")[0], None)


def _as_they_are(found: Iterator[Image], kind: str, vision: Any) -> Iterator[Image]:
    return found


def _plain(visual: Tensor, x: Tensor, step: Step, reducer: Projector) -> Iterator[Image]:
    """Images of which only the embeddings are known."""
    ends = None
    if step.newline is not None and reducer.newlines != "rank":
        ends = visual & (x == step.newline.to(x)).all(-1)
    for r, s, n in zip(*(t.tolist() for t in runs(visual)), strict=True):
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
    for r, s, n in zip(*(t.tolist() for t in runs(here, starts)), strict=True):
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
        gone, size = _merged(encoded, origin, views)
        if gone is not None:
            key = (*key, r, s)  # other tokens are left in every image
        yield Image(r, s + torch.arange(n, device=here.device), origin, views, kind, rows, key, gone, size, e, first)


def _merged(encoded: Encoded, origin: Origin, views: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """(n,) bool of the tokens of an image that are copies since a method acted in the tower, and (n,) sizes."""
    at = torch.tensor(views, device=origin.index.device)
    left = encoded.left(at)
    if left is None:
        return None, None
    here = left.flatten()[origin.index]
    if origin.weight is not None:
        here = here & (origin.weight > 0)
    gone = ~here.any(1) & (origin.view >= 0)
    number = encoded.sizes(at)
    return gone, None if number is None else origin.map(number.reshape(1, -1))[0]


def _group(
    alike: list[Image],
    step: Step,
    x: Tensor,
    reducer: Projector,
    text: tuple[Tensor, Tensor] | None,
    said: tuple[JointSpace, Tensor] | None,
) -> Group | None:
    """Evidence of ``alike``; None where no token of theirs is left, as in a frame that a method in the tower merged
    into others."""
    first, device = alike[0], x.device
    origin = first.origin
    seen = torch.arange(origin.n, device=device) if reducer.newlines == "rank" else origin.seen().to(device)
    size = None
    if first.gone is not None:
        seen = seen[~first.gone[seen]]
        size = None if first.size is None else first.size[seen][None]
    r = torch.tensor([i.row for i in alike], device=device)[:, None]
    places = torch.stack([i.columns for i in alike])
    gone = torch.zeros(origin.n, dtype=torch.bool, device=device) if first.gone is None else first.gone
    if reducer.newlines == "drop":
        gone = gone | (origin.view < 0)
    if bool(gone.any()):
        step.dropped.append((r, places[:, gone]))
    if not len(seen):
        return None
    columns = places[:, seen]
    own = origin if len(seen) == origin.n else origin.take(seen)
    encoded = step.encoded.get(first.kind)
    blocks, features, class_features, feature, depth, plans = {}, None, None, -1, 0, {}
    pixels = pooled = through = None
    if encoded is not None:
        feature, depth = encoded.vision.feature, encoded.vision.depth
        views = torch.tensor([i.views for i in alike], device=device).flatten()
        for b in encoded.blocks:
            blocks[b] = encoded.evidence(b, views)
            if (plan := encoded.plan_at(b, views)) is not None:
                plans[b] = plan
        if encoded.features is not None and first.rows is not None:
            flat = encoded.features.flatten(0, 1)
            rows = torch.stack([_rows_of(i) for i in alike]).to(device)[:, seen]
            features = flat.index_select(0, rows.flatten()).view(*rows.shape, -1)
        if encoded.own is not None:
            class_features = encoded.own[views]
        if encoded.given is not None:
            pixels = encoded.pixels(views)
        if encoded.entered is not None:
            table = entering(encoded)
            own_rows = torch.stack([_entered(i, encoded, table) for i in alike]).to(device)[:, seen]
            through = table[own_rows.to(table.device)].to(device), projection(encoded.vision)
        if encoded.pooled is not None:
            pooled = encoded.pooled[0][views], encoded.pooled[1][views]
    clip = None
    if said is not None:
        if features is None:
            raise ValueError(
                f"{reducer.name} with clip compares patches before the projector with the question, and these tokens "
                f"are made of several patches each; set clip=None"
            )
        clip = (said[0].patches(features), said[1][r[:, 0]])
    return Group(
        r, columns,
        ImageEvidence(
            take_rows(x, r, columns), own, clip=clip, features=features, own=class_features, blocks=blocks, plans=plans,
            feature=feature, tower_depth=depth, size=size, text=None if text is None else text[0][r[:, 0]],
            text_valid=None if text is None else text[1][r[:, 0]], pixels=pixels, pooled=pooled,
            through=through,
        ),
    )  # fmt: skip


def take_rows(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(G,N,D) of ``x`` (B,L,D) at ``rows`` (G,1) and ``columns`` (G,N), copied by whole rows."""
    where = rows * x.shape[1] + columns
    return x.flatten(0, 1).index_select(0, where.flatten()).view(*where.shape, -1)


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


def _asked(step: Step) -> Tensor:
    """(B,L) bool: the text behind the last image, all text where nothing is."""
    visual, mask = step.run.visual, step.run.mask
    real = torch.ones_like(visual) if mask is None else mask.clone()
    real[:, : step.run.front] = False  # its embeddings are not here
    behind = question(visual, real)
    return torch.where(behind.any(1, keepdim=True), behind, real & ~visual)


def _said(step: Step, reducer: Projector, source: str, x: Tensor) -> tuple[JointSpace, Tensor]:
    """The CLIP model that ``reducer`` names, and (B,M,E) the questions in its space."""
    if step.ids is None:
        raise ValueError(f"{reducer.name} with clip reads the question in input_ids; pass them, or set clip=None")
    space = joint_space(reducer.clip, x.device)  # type: ignore[attr-defined]
    return space, space.texts(question_texts(step.ids, _asked(step), tokenizer_of(source)))[0]


@functools.lru_cache(maxsize=4)
def tokenizer_of(source: str) -> Any:
    """The tokenizer of a language model. Raises ``ValueError`` where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the setting clip needs the tokenizer of the language model to read the question, and {source!r} (the "
            f"model's name_or_path) has none; load the model with from_pretrained from a folder with its tokenizer, or "
            f"set clip=None"
        ) from error


def _question(step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B,M,D) embeddings of the question (see :func:`_asked`), and (B,M) which are there."""
    behind = _asked(step)
    most = max(int(behind.sum(1).max()), 1)
    where = (~behind).long().argsort(dim=1, stable=True)[:, :most]
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, where], behind.gather(1, where)
