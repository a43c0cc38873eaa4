"""Budgets over the views of an image (overview and crops, or frames), for methods that see all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending
from tokenreduce.core.evidence import VisualEvidence

__all__ = ["apportion", "covered", "marked", "ranks", "rooms"]


def rooms(evidence: VisualEvidence) -> Tensor:
    """(V,) how many tokens every view has; 0 for a crop that is all padding."""
    crops = evidence.crops
    return torch.bincount(evidence.view, minlength=1 if crops is None else 1 + crops[0] * crops[1])


def covered(evidence: VisualEvidence) -> Tensor:
    """(N,) for a token of the overview the view of the crop that shows its place, 1.. row-major; 0 for other tokens.

    Where the grid of the overview is no multiple of the crops, the last row and column of crops cover what is left.
    """
    assert evidence.crops is not None
    (h, w), (rows, columns), place = evidence.shape, evidence.crops, evidence.place
    row = (place[:, 0] // max(1, h // rows)).clamp(max=rows - 1)
    column = (place[:, 1] // max(1, w // columns)).clamp(max=columns - 1)
    return torch.where(evidence.view == 0, 1 + row * columns + column, 0)


def ranks(scores: Tensor, view: Tensor) -> Tensor:
    """(B,N) 0-based rank of every token by its score (B,N) among those of its view (N,); ties to the lower index.

    >>> ranks(torch.tensor([[1.0, 2.0, 5.0, 2.0, 5.0]]), torch.tensor([0, 0, 0, 1, 1])).tolist()
    [[2, 1, 0, 1, 0]]
    """
    order = descending(scores)
    order = order.gather(1, view[order].argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(len(view), device=view.device).expand_as(order))
    return rank - torch.searchsorted(view.sort().values, view)


def marked(stay: Tensor, k: int) -> Tensor:
    """(B,k) indices of the ``k`` tokens that every sample has marked in ``stay`` (B,N), in order."""
    return stay.long().argsort(dim=1, descending=True, stable=True)[:, :k]


def apportion(total: int | Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """(B,V) whole numbers in proportion to ``weights`` (B,V) >= 0, none above ``room`` (V,), which sum to ``total`` or
    to all the room there is. What a view has no room for goes to the others in proportion, and evenly where these weigh
    nothing; fractions go to the largest remainders, ties to the first view.

    >>> apportion(10, torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 1.0]]), torch.tensor([9, 9, 4])).tolist()
    [[3, 3, 4], [3, 3, 4]]
    """
    weights, most = weights.double(), room.double().expand_as(weights)
    wanted = torch.as_tensor(total, device=room.device).double().clamp(max=most.sum(1, keepdim=True))
    quota = torch.zeros_like(weights)
    for _ in range(len(room) + 1):  # every round but the last fills a view
        free = quota < most
        part = weights * free
        part = torch.where(part.sum(1, keepdim=True) > 0, part, free.double())
        left = (wanted - quota.sum(1, keepdim=True)).clamp(min=0)
        quota = torch.minimum(quota + left * part / part.sum(1, keepdim=True).clamp(min=1e-300), most)
    base = (quota + 1e-6).floor()
    rest = ((quota - base) * 1e6).round().masked_fill(base >= most, float("-inf"))  # equal ones must tie
    first = ranks(rest, torch.zeros_like(room))
    return (base + (first < wanted - base.sum(1, keepdim=True))).long()
