"""Evidence for methods inside a language model: samples written as text such as "ttvvvt", "." for no token."""

from __future__ import annotations

import torch

from tokenreduce import Evidence
from tokenreduce.core.evidence import Prompt

#: Two samples with different numbers of visual tokens, padded on either side, and two images in one of them.
LAYOUTS = ("ttvvvvvvvvvvtttt", "..tvvvvvvtvvvttt")
RIGHT = ("ttvvvvvvvvvvtttt", "tvvvvvvtvvvttt..")
HEADS, KEY_HEADS, DIM, WIDTH = 4, 2, 8, 12


def marks(layouts, letters):
    return torch.tensor([[c in letters for c in row] for row in layouts])


def mixed(layouts=LAYOUTS, *, layer=2, depth=4, seed=0, rows=slice(None), prompt=None, **more) -> Evidence:
    """Random evidence; grouped key heads and a scaling norm, as models have. ``rows`` picks samples of the same batch;
    ``prompt`` are the layouts at the entry, where tokens are gone since."""
    g = torch.Generator().manual_seed(seed)
    b, n = len(layouts), len(layouts[0])
    x, k, v = (torch.randn(b, *shape, generator=g) for shape in ((n, WIDTH), *[(KEY_HEADS, n, DIM)] * 2))
    q = torch.randn(b, HEADS, n, DIM, generator=g)
    entry = layouts if prompt is None else prompt
    e = torch.randn(b, len(entry[0]), WIDTH, generator=g)[rows]
    visual, there = marks(layouts, "v")[rows], marks(layouts, "tv")[rows]
    weight = torch.rand(WIDTH, generator=g) + 0.5
    number = (marks(layouts, "v").long().cumsum(1) - 1)[rows]  # a video of frames of three tokens
    films = torch.stack([torch.zeros_like(number), number // 3, number // 3, number % 3], -1)
    films = films.masked_fill(~marks(layouts, "v")[rows].unsqueeze(-1), -1)
    key = ((number % 5 == 3) & visual).float()
    before = torch.randn(b, n, WIDTH, generator=torch.Generator().manual_seed(seed + 1))[rows]
    # images of 2 x 3 tokens
    place = torch.stack([number // 6, 0 * number, number % 6 // 3, number % 3, number % 6, 0 * number + 6], -1)
    place = place.masked_fill(films[..., :1] < 0, -1)
    settings = dict(
        place_of=place, before=before, keys=k[rows], queries=q[rows], values=v[rows], visual=visual,
        valid=None if there.all() else there, cls=False, causal=True, frame_of=films, scores=key, layer=layer,
        depth=depth, prompt=Prompt(marks(entry, "v")[rows], marks(entry, "tv")[rows], e),
        norm=lambda h: h / h.square().mean(-1, keepdim=True).sqrt() * weight,
    )  # fmt: skip
    return Evidence(x[rows], **{**settings, **more})


def seen_by(evidence, b, row):
    """Attention of one row of sample b to every token, averaged over heads, in plain loops over heads and keys."""
    total = torch.zeros(evidence.n, dtype=torch.double)
    for h in range(HEADS):
        logits = torch.full((evidence.n,), float("-inf"), dtype=torch.double)
        for j in range(row + 1):
            if evidence.valid is None or evidence.valid[b, j]:
                key = evidence.keys[b, h // (HEADS // KEY_HEADS), j].double()
                logits[j] = float(evidence.queries[b, h, row].double() @ key) / DIM**0.5
        total += logits.softmax(0)
    return total / HEADS


def maps(evidence, b):
    """(H,N,N) causal softmax of one sample in float64, padding hidden."""
    n = evidence.n
    out = torch.zeros(HEADS, n, n, dtype=torch.double)
    for h in range(HEADS):
        for i in range(n):
            seen = [j for j in range(i + 1) if evidence.valid is None or evidence.valid[b, j]]
            if seen:
                k = evidence.keys[b, h // (HEADS // KEY_HEADS), seen].double()
                out[h, i, seen] = (k @ evidence.queries[b, h, i].double() / DIM**0.5).softmax(0)
    return out


def kept_of(plan, b):
    """The places of sample b's tokens that are there after ``plan``."""
    valid = plan.validity()
    keep = plan.representatives()[b]
    return (keep if valid is None else keep[valid[b]]).tolist()


def last_of(layout):
    return max(i for i, c in enumerate(layout) if c != ".")
