"""What counts as right: one label per image, or several of which every one must be found."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NEIGHBOURS", "Answers", "agreement", "correct", "neighbours", "ranks", "scores"]

#: Neighbours and temperature of the k-nn classifier for models without a head (DINO, 2104.14294).
NEIGHBOURS, TEMPERATURE = 20, 0.07


class Answers(NamedTuple):
    """Evaluated images: positions ``ids``, labels ``y`` and best classes ``top`` (n,k) with -1 for none.

    ``y`` is (n,), or (n,m) of images with several labels, -1 where there are fewer than m. ``broken`` counts outputs
    that are not finite.
    """

    ids: Tensor
    y: Tensor
    top: Tensor
    broken: int


def ranks(y: Tensor, classes: int) -> int:
    """How many of the best classes are looked at: five, or as many as an image may have labels."""
    return min(classes, max(5, y.shape[1]) if y.ndim == 2 else 5)


def scores(answers: Answers, classes: int) -> dict[str, float | None]:
    """The accuracies of a row.

    With one label per image ``top1`` and ``top5`` (None with five classes or fewer). With several, ``accuracy`` is the
    share of images whose n labels are the n best classes, and ``found`` the share of the labels that are among them,
    averaged over images. The first of each comes with its standard error.
    """
    n, share = len(answers.y), _found(answers)
    first = int((share == 1).sum()) / n
    if answers.y.ndim == 1:
        first_key, hits = "top1", answers.top == answers.y[:, None]
        more = {"top5": int(hits.any(1).sum()) / n if classes > 5 else None}
    else:
        first_key, more = "accuracy", {"found": float(share.double().mean())}
    return {first_key: first, f"{first_key}_stderr": math.sqrt(first * (1 - first) / n), **more}


def correct(answers: Answers) -> dict[int, bool]:
    """By position, whether an image counts as right in the first accuracy of :func:`scores`."""
    return dict(zip(answers.ids.tolist(), (_found(answers) == 1).tolist(), strict=True))


def _found(answers: Answers) -> Tensor:
    """Share (n,) of the labels of an image that are among as many best classes."""
    y = answers.y[:, None] if answers.y.ndim == 1 else answers.y
    found = (y[:, :, None] == _first(answers)[:, None, :]).any(2) & (y >= 0)
    return found.sum(1) / (y >= 0).sum(1)  # type: ignore[no-any-return]


def agreement(answers: Answers, baseline: Answers) -> float:
    """Share of the images of ``answers`` on which the answer is the baseline's: the best class, or the set of the n
    best for n labels."""
    place = torch.full((int(max(baseline.ids.max(), answers.ids.max())) + 1,), -1)
    place[baseline.ids] = torch.arange(len(baseline.ids))
    at = place[answers.ids]
    mine, theirs = (_first(a).sort(1).values for a in (answers, baseline))
    return int(((mine == theirs[at]).all(1) & (at >= 0)).sum()) / len(at)


def _first(answers: Answers) -> Tensor:
    """The best classes that count, (n,1), or (n,k) with -2 behind the n-th for n labels."""
    if answers.y.ndim == 1:
        return answers.top[:, :1]
    rank = torch.arange(answers.top.shape[1])
    return answers.top.masked_fill(rank >= (answers.y >= 0).sum(1, keepdim=True), -2)


def neighbours(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Leave-one-out k-nearest-neighbour classification: features (n,D) and labels (n,) to best classes (n, up to 5).

    Cosine similarity, the 20 nearest other images vote with exp(similarity / 0.07) as in DINO (2104.14294); classes
    without a vote are -1. Raises ``ValueError`` for fewer than two images.
    """
    n = len(features)
    if n < 2:
        raise ValueError("nearest neighbours need at least two images")
    unit = F.normalize(features.float(), dim=-1)
    out = []
    for start in range(0, n, 1024):
        rows = unit[start : start + 1024]
        similar = rows @ unit.T
        similar[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = float("-inf")
        near = similar.topk(min(NEIGHBOURS, n - 1), dim=-1)
        votes = torch.zeros(len(rows), classes).scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
        best = votes.topk(min(5, classes), dim=-1)
        out.append(best.indices.masked_fill(best.values == 0, -1))
    return torch.cat(out)
