"""Evidence between a vision tower and a language model, without a model: views, crops, row ends, 2x2 units."""

from __future__ import annotations

import torch

from tokenreduce import Evidence
from tokenreduce.core.evidence import ImageEvidence, Origin

HEADS, DIM, WIDTH, EMBED = 2, 8, 16, 12


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(rows: int, cols: int) -> Origin:
    """One view whose patches are the tokens."""
    n = rows * cols
    at = torch.arange(n)
    place = torch.stack([at // cols, at % cols], 1)
    return Origin(at[:, None], None, n, torch.zeros(n, dtype=torch.long), place, (rows, cols))


def units(rows: int, cols: int) -> Origin:
    """One view of (rows, cols) tokens that are 2x2 patches each."""
    at = torch.arange(rows * cols)
    place = torch.stack([at // cols, at % cols], 1)
    first = place[:, :1] * 2 * cols * 2 + place[:, 1:] * 2
    index = torch.cat([first, first + 1, first + 2 * cols, first + 2 * cols + 1], 1)
    return Origin(index, None, rows * cols * 4, torch.zeros(rows * cols, dtype=torch.long), place, (rows, cols))


def anyres(side: int = 4, crops: tuple[int, int] = (1, 2), cut: int = 1) -> Origin:
    """An overview and crops; ``cut`` rows of the stitched crops are padding, above and below, and gone; a row end after
    every row."""
    n, (rows, cols) = side * side, crops
    at = torch.arange(n)
    index, view, place = [*at.tolist()], [0] * n, torch.stack([at // side, at % side], 1).tolist()
    weight = [1.0] * n
    for r in range(cut, rows * side - cut):
        for c in range(cols * side):
            v = 1 + (r // side) * cols + c // side
            index.append(v * n + (r % side) * side + c % side)
            view.append(v)
            place.append([r, c])
            weight.append(1.0)
        index.append(0)
        view.append(-1)
        place.append([r, cols * side])
        weight.append(0.0)
    return Origin(
        torch.tensor(index)[:, None], torch.tensor(weight)[:, None], n, torch.tensor(view), torch.tensor(place),
        (side, side), crops,
    )  # fmt: skip


def frames(count: int = 3, rows: int = 4, cols: int = 4) -> Origin:
    """Frames whose patches are the tokens."""
    one = grid(rows, cols)
    n = one.n
    return Origin(
        torch.arange(count * n)[:, None], None, n, torch.arange(count).repeat_interleave(n),
        one.place.repeat(count, 1), (rows, cols),
    )  # fmt: skip


ORIGINS = {
    "square": grid(4, 4), "wide": grid(3, 7), "large": grid(12, 12), "units": units(4, 5), "anyres": anyres(),
    "crops": anyres(4, (2, 2), 0), "frames": frames(), "film": frames(9, 3, 5), "ticks": frames(11, 1, 1),
}  # fmt: skip


def visual(
    origin: Origin = ORIGINS["square"], batch: int = 2, *, cls: bool = True, seed: int = 0, depth: int = 4,
    feature: int | None = None, x=None, features=None, attention=None, keys=None, queries=None, words: int = 5,
    joint: bool = True, rows=slice(None),
) -> ImageEvidence:  # fmt: skip
    """Evidence of ``batch`` images; ``rows`` picks some of the same batch. Every block of the tower of ``depth`` is
    there; ``attention``, ``keys``, ``queries`` (batch*views, heads, patches, ..) replace what all blocks saw, ``x`` and
    ``features`` (batch, tokens, ..) the embeddings; those of row ends are equal."""
    views, p = max(origin.views, 1), int(cls)
    n, patches = origin.n, origin.patches + p
    pooled = origin.index.shape[1] > 1

    def pick(t, per=1):
        return t.view(batch, per, *t.shape[1:])[rows].flatten(0, 1) if per > 1 else t[rows]

    embeds = noise(batch, n, EMBED, seed=seed) if x is None else x
    embeds = torch.where((origin.view < 0)[None, :, None], torch.ones(EMBED), embeds)
    before = noise(batch, n, WIDTH, seed=seed + 1) if features is None else features
    blocks = {}
    for i in range(depth):
        s = seed + 10 * (i + 1)
        q = noise(batch * views, HEADS, patches, DIM, seed=s) if queries is None else queries
        k = noise(batch * views, HEADS, patches, DIM, seed=s + 1) if keys is None else keys
        blocks[i] = Evidence(
            pick(noise(batch * views, patches, WIDTH, seed=s + 2), views), pick(k, views), pick(q, views),
            None if attention is None else pick(attention, views), protected=p, cls=cls, layer=i, depth=depth,
        )  # fmt: skip
    valid = torch.ones(batch, words, dtype=torch.bool)
    valid[0, words // 2 :] = False
    return ImageEvidence(
        pick(embeds), origin, features=None if pooled else pick(before),
        own=pick(noise(batch * views, WIDTH, seed=seed + 2), views) if cls and not pooled else None, blocks=blocks,
        feature=(depth - 2 if cls else depth - 1) if feature is None else feature, tower_depth=depth,
        through=(pick(noise(batch, n, 6, seed=seed + 6)), bent),
        text=pick(noise(batch, words, EMBED, seed=seed + 3)), text_valid=pick(valid),
        clip=(pick(noise(batch, n, 6, seed=seed + 4)), pick(noise(batch, 1, 6, seed=seed + 5))) if joint else None,
    )  # fmt: skip


def bent(rows: torch.Tensor) -> torch.Tensor:
    """A projector (...,6) to (...,EMBED) of two layers."""
    first, second = noise(6, 9, seed=100), noise(9, EMBED, seed=101)
    return torch.nn.functional.gelu(rows.float() @ first) @ second


def patches_of(evidence: ImageEvidence, look, b: int = 0):
    """Queries and keys (heads, patches, d) in float64 of one image with one view in a block of its tower."""
    block = evidence.tower(look).patches
    return block.queries[b].double(), block.keys[b].double()


def class_row(evidence: ImageEvidence, look=None, b: int = 0) -> torch.Tensor:
    """The card's step on one image, in plain loops: softmax of the class token's row in every head, mean, class column
    removed; float64 (patches,)."""
    q, k = patches_of(evidence, look, b)
    rows = []
    for h in range(q.shape[0]):
        logits = torch.stack([q[h, 0] @ k[h, j] for j in range(k.shape[1])]) / q.shape[-1] ** 0.5
        rows.append(logits.softmax(0)[1:])
    return torch.stack(rows).mean(0)


def received(evidence: ImageEvidence, look=None, b: int = 0) -> torch.Tensor:
    """Attention received by every patch, mean over heads and all queries; float64 (patches,)."""
    q, k = patches_of(evidence, look, b)
    maps = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)
    return maps.mean(0)[evidence.tower(look).patches.prefix :]
