"""Places of visual tokens in models with M-RoPE, whose positions are time, row and column in the image.

vLLM asks a model for the positions of a prompt before any image is encoded, when only the number of tokens that stay is
known and not which. Text positions are final then, since they do not depend on which stay: they are those of the whole
prompt. The places of visual tokens travel in columns behind their embeddings, and :func:`placed` (of prompts in which
placeholders are all that waits) or :func:`arrived` writes them when the tokens of a chunk come. Everything here is
arithmetic on token ids and tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "COLUMNS", "FARTHEST", "Run", "Whole", "ahead", "arrived", "extent", "packed", "placed", "places_in", "unpacked",
    "waiting", "whole_prompt",
]  # fmt: skip

#: Half-precision numbers count exactly to 256 (bfloat16): each of three coordinates is two digits of this base.
_BASE = 256
#: Places are below this number.
FARTHEST = _BASE * _BASE
#: Columns behind an embedding.
COLUMNS = 6


def packed(rows: Tensor, places: Tensor) -> Tensor:
    """``rows`` (K,D) with ``places`` (K,3), time, row and column counted from the first token of their image, in
    :data:`COLUMNS` more columns. Raises ``ValueError`` for places that the columns cannot hold."""
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < FARTHEST:
        raise ValueError(f"places of visual tokens are in [0, {FARTHEST}), not up to {int(places.max())}")
    return torch.cat([rows, (places // _BASE).to(rows), (places % _BASE).to(rows)], 1)


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (K,D) and places (K,3) of what :func:`packed` made."""
    x, high, low = rows[:, :-COLUMNS], rows[:, -COLUMNS:-3], rows[:, -3:]
    return x, high.round().long() * _BASE + low.round().long()


@dataclass(frozen=True)
class Run:
    """The placeholders of an image in a prompt: ``length`` tokens from ``offset`` on, which stand for ``whole`` visual
    tokens of the unreduced image."""

    offset: int
    length: int
    whole: int


@dataclass(frozen=True)
class Whole:
    """A prompt in which no token was dropped: its ``tokens``, the runs in it, and the ``columns`` of the tokens that
    the short prompt has."""

    tokens: list[int]
    runs: list[Run]
    columns: list[int]


def whole_prompt(tokens: Sequence[int], runs: Sequence[Run], media: Collection[int]) -> Whole:
    """``tokens`` of a prompt with every run grown back to as many ``media`` tokens (ids of placeholders) as the image
    has, behind the last one that is there. Raises ``ValueError`` for a run without any."""
    out = Whole([], [], [])
    at = 0

    def take(part: Sequence[int]) -> None:
        out.columns.extend(range(len(out.tokens), len(out.tokens) + len(part)))
        out.tokens.extend(part)

    for run in sorted(runs, key=lambda r: r.offset):
        take(tokens[at : run.offset])
        at, start = run.offset + run.length, len(out.tokens)
        inside = tokens[run.offset : at]
        there = [i for i, t in enumerate(inside) if t in media]
        if not there:
            raise ValueError(f"the {run.length} tokens from column {run.offset} on have no placeholder among them")
        take(inside[: there[-1] + 1])
        out.tokens.extend([inside[there[-1]]] * (run.whole - len(there)))
        take(inside[there[-1] + 1 :])
        out.runs.append(Run(start, len(out.tokens) - start, run.whole))
    take(tokens[at:])
    return out


def ahead(positions: Tensor) -> int:
    """What the position of a new token is ahead of its column, in a prompt with ``positions`` (3,L): it follows the
    last token, as in transformers' ``generate``, and not the highest position, which in a long video is beyond the
    text."""
    return int(positions[:, -1].max()) + 1 - positions.shape[1]


def placed(
    ids: Tensor, rows: Sequence[Tensor], positions: Tensor, computed: int, media: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The embeddings of ``rows`` without their places, and ``positions`` (3,L) with these written in.

    Args:
        ids: (L,) tokens of the prompt.
        rows: what :func:`packed` made of the images of this chunk, or the parts of them that are in it: the
            placeholders at columns from ``computed`` on, in order.
        positions: (3,L), right for all text. Not changed.
        computed: columns that earlier chunks brought.
        media: ids of placeholders. A run of them follows a token of text.
    """
    positions = positions.clone()
    there = torch.isin(ids, media)
    where = there.nonzero().flatten()
    where = where[where >= computed]
    first = (there & ~there.roll(1)).nonzero().flatten()
    clean, used = [], 0
    for part in rows:
        x, places = unpacked(part)
        columns = where[used : used + len(x)]
        used += len(x)
        before = first[torch.searchsorted(first, columns, right=True) - 1] - 1
        start = positions[:, before].amax(0) + 1
        positions[:, columns] = start + places.T.to(positions)
        clean.append(x)
    return clean, positions


# -- images with text between their parts (the frames of a film in Qwen3-VL, each behind its time) ---------------------
def extent(text: int, frames: int, rows: int, columns: int) -> int:
    """How far positions go on over an image or film with ``text`` tokens between its ``frames`` of (rows, columns)."""
    return text + frames * max(rows, columns)


def places_in(visual: Tensor, rows: int, columns: int) -> Tensor:
    """(L,3) places of the tokens of a whole image or film, counted from its first: ``visual`` (L,) bool marks those of
    its frames of (rows, columns) tokens, the others are text."""
    before = visual.long().cumsum(0) - visual.long()
    frame, at = before // (rows * columns), before % (rows * columns)
    start = (~visual).long().cumsum(0) - (~visual).long() + frame * max(rows, columns)
    inside = torch.stack([torch.zeros_like(at), at // columns, at % columns], 1)
    return start[:, None] + inside * visual[:, None]


def waiting(length: int, runs: Sequence[tuple[int, int, int]]) -> Tensor:
    """Positions (3,length) of a prompt, final for its text. ``runs`` are the first column of each image, how many
    columns it has, and its :func:`extent`: these columns hold -1 - start until :func:`arrived` writes them."""
    out = torch.arange(length)
    for offset, columns, far in sorted(runs):
        start = int(out[offset])
        out[offset + columns :] += far - columns
        out[offset : offset + columns] = -1 - start
    return out.expand(3, -1).clone()


def arrived(rows: Sequence[Tensor], positions: Tensor, computed: int) -> tuple[list[Tensor], Tensor]:
    """The embeddings of ``rows`` without their places, and ``positions`` (3,L) with these written into the first
    columns from ``computed`` on that are :func:`waiting`. ``positions`` are not changed."""
    positions = positions.clone()
    where = (positions[0] < 0).nonzero().flatten()
    where = where[where >= computed]
    parts = [unpacked(part) for part in rows]
    if parts:
        places = torch.cat([places for _, places in parts]).T.to(positions)
        columns = where[: places.shape[1]]
        positions[:, columns] = places - 1 - positions[:, columns]
    return [x for x, _ in parts], positions
