"""Composite tokens of a prompt (arXiv 2411.07132): a noun and what belongs to it as one token, the sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenreduce.core.plan import Merge

__all__ = ["Group", "composite_plan"]

#: Places of the tokens of a noun, and of what belongs to it.
Group = tuple[Sequence[int], Sequence[int]]


def composite_plan(n: int, groups: Sequence[Group], noun_weight: float = 1.0, attribute_weight: float = 1.0) -> Merge:
    """The plan on one prompt of ``n`` tokens in which each group becomes one token, at the place of its noun's first.

    Its value is ``noun_weight`` times the sum of the noun's tokens plus ``attribute_weight`` times that of the others.
    All other tokens stay as they are, in order.

    Raises ``ValueError`` for places that are not there or in two groups, and a group without a noun.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    >>> composite_plan(5, [([3], [1, 2])]).reduce(x).flatten().tolist()
    [1.0, 9.0, 5.0]
    """
    taken: list[int] = []
    weights = torch.ones(1, n)
    for noun, others in groups:
        if not noun:
            raise ValueError("every group has a noun, where its composite token stands")
        taken += [*noun, *others]
        for places, weight in ((noun, noun_weight), (others, attribute_weight)):
            for place in places:
                if not 0 <= place < n:
                    raise ValueError(f"place {place} is not among the {n} tokens of the prompt")
                weights[0, place] = weight
    if twice := sorted({place for place in taken if taken.count(place) > 1}):
        raise ValueError(f"tokens at {twice} would be in two composite tokens")
    joined = [(place, noun[0]) for noun, others in groups for place in [*noun[1:], *others]]
    gone = {place for place, _ in joined}
    keep = [place for place in range(n) if place not in gone]
    src = torch.tensor([[place for place, _ in joined]], dtype=torch.long)
    dst = torch.tensor([[keep.index(home) for _, home in joined]], dtype=torch.long)
    return Merge(n, torch.tensor([keep]), src, dst, weights, mode="sum", by_size=False)
