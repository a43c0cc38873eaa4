"""Disjoint parts of a data set: few samples to throw bad settings out, more to choose on, and the rest to report."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Parts", "parts"]

#: Shares of the samples that settings are chosen on; of these, what is looked at first; and the least of each.
CHOSEN, FIRST, LEAST = 0.5, 0.25, 12


class Parts(NamedTuple):
    """Positions of samples, ascending. ``first`` is a part of ``chosen``, which ``held`` has nothing of."""

    first: list[int]
    chosen: list[int]
    held: list[int]


def parts(n: int, seed: int) -> Parts:
    """``n`` samples cut at random by ``seed``. Raises ``ValueError`` where a part would be too small."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = int(n * CHOSEN)
    first = int(chosen * FIRST)
    if first < LEAST:
        need = int(LEAST / CHOSEN / FIRST)
        raise ValueError(
            f"{n} samples are too few to choose on one part and measure on another that is held out; give {need} or "
            "more"
        )
    return Parts(sorted(order[:first]), sorted(order[:chosen]), sorted(order[chosen:]))
