"""Evidence of the cache stage with all that goes wrong easily: two samples of unequal length, groups of query heads."""

from __future__ import annotations

import math

import torch

from tokenreduce import CacheEvidence

#: Two samples as text: "v" a visual slot, "t" text, "." none. Odd numbers of slots.
LEFT = ("tvvvvvvtvvvvvttvvvtttt", "....tvvvvvvtvvvvvvvttt")
RIGHT = ("tvvvvvvtvvvvvttvvvtttt", "tvvvvvvtvvvvvvvttt....")
EQUAL = ("tvvvvvvtvvvvvttvvvttttt", "vvvvtvvvvvvtvvvvvvvtttt")
GROUPS = (1, 2, 7)
DIM = 8


def marks(layouts, letters):
    return torch.tensor([[c in letters for c in row] for row in layouts])


def cache(layouts=LEFT, *, kv_heads=2, groups=2, rows=6, seed=0, dim=DIM, **more) -> CacheEvidence:
    """Random keys, values and last queries."""
    g = torch.Generator().manual_seed(seed)
    b, n = len(layouts), len(layouts[0])
    keys, values = (torch.randn(b * kv_heads, n, dim, generator=g) for _ in range(2))
    queries = torch.randn(b * kv_heads, groups, min(rows, n), dim, generator=g)
    there = marks(layouts, "tv")
    settings = dict(
        queries=queries, kv_heads=kv_heads, visual=marks(layouts, "v"), valid=None if bool(there.all()) else there,
        depth=4,
    )  # fmt: skip
    return CacheEvidence(keys, values, **{**settings, **more})


def kept_of(plan, row):
    """Slots of a row that are there after ``plan``, in its order."""
    valid = plan.validity()
    keep = plan.representatives()[row]
    return (keep if valid is None else keep[valid[row]]).tolist()


def present(evidence, row):
    return [i for i in range(evidence.n) if bool(evidence.there[row, i])]


def visual_slots(evidence, row):
    return [i for i in range(evidence.n) if bool(evidence.visual[row, i])]


def softmax_row(evidence, row, head, r, among=None, scale=None):
    """{slot: share} of query ``r`` (of those known) of one query head over the slots it sees, in a plain loop."""
    at = evidence.n - evidence.rows_given + r
    sees = [j for j in (present(evidence, row) if among is None else among) if j <= at]
    scale = evidence.keys.shape[-1] ** -0.5 if scale is None else scale
    query = evidence.queries[row, head, r].double()
    logits = {j: scale * float(query @ evidence.keys[row, j].double()) for j in sees}
    top = max(logits.values(), default=0.0)
    powers = {j: math.exp(v - top) for j, v in logits.items()}
    total = sum(powers.values())
    return {j: p / total for j, p in powers.items()}


def best_of(scores, count):
    """The ``count`` slots of {slot: score} with the largest scores, ties to the lower one, ascending."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[: max(0, count)])


def counted(keep, n):
    return min(keep, n) if isinstance(keep, int) else min(n, max(1, int(keep * n + 0.5)))
