"""Greedy choices that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import threshold

__all__ = ["cover", "farthest"]

#: Candidates that are looked at again in every step before the others; more cost time, fewer miss the best too often.
_BLOCK = 16


def cover(
    worth: Tensor, keep: int, weight: Tensor | None = None, *, combination: str = "product", least: float = 0.0
) -> Tensor:
    """(B,K) greedy choice of the candidates that together cover most, in order of choice; ties to the lower index.

    A part r is covered as far as the largest ``worth[b, j, r]`` of the chosen j, at least 0. Every step takes the
    candidate with the highest score: its gain, which is the coverage that it adds over all parts (facility location),
    times ``weight`` or plus it. A prefix is the answer for a smaller ``keep``.

    On the CPU most gains are not computed again: they only shrink, also when rounded, so that an old one is an upper
    bound (lazy greedy, Minoux 1978). The choice is the same to the last bit. Elsewhere asking for values in every step
    would cost more than it saves, and a compiled graph cannot.

    Args:
        worth: (B,N,R) float32, finite and >= 0, candidates first, so that sums run along memory.
        keep: K, at most N.
        weight: (B,N) float32 >= 0, or None for the gain alone.
        combination: "product" for gain * weight, "sum" for gain + weight.
        least: gains up to this count as 0.
    """
    worth, weight = worth.detach(), None if weight is None else weight.detach()
    if worth.device.type != "cpu" or torch.compiler.is_compiling():
        return _plain(worth, keep, weight, combination, least)
    rows = [_lazy(worth[b], keep, None if weight is None else weight[b], combination, least) for b in range(len(worth))]
    return torch.tensor(rows, dtype=torch.long).view(len(worth), keep)


def _score(gain: Tensor, weight: Tensor | None, combination: str, least: float) -> Tensor:
    """Never falls when ``gain`` rises, also when rounded: the score of an upper bound is an upper bound."""
    if least > 0:
        gain = threshold(gain, least, 0.0)
    if weight is None:
        return gain
    return gain * weight if combination == "product" else gain + weight


def _plain(worth: Tensor, keep: int, weight: Tensor | None, combination: str, least: float) -> Tensor:
    """Every gain in every step, all samples at once."""
    gain, left = worth.sum(2), torch.empty_like(worth)
    covered, taken = torch.zeros_like(worth[:, 0]), torch.zeros_like(gain, dtype=torch.bool)
    chosen = [torch.empty_like(taken[:, :0], dtype=torch.long)]
    for step in range(keep):
        if step:
            gain = torch.sub(worth, covered.unsqueeze(1), out=left).relu_().sum(2)
        best = _score(gain, weight, combination, least).masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        taken = taken.scatter(1, best, True)
        row = worth.gather(1, best.unsqueeze(-1).expand(-1, -1, worth.shape[2])).squeeze(1)
        covered = torch.maximum(covered, row)
        chosen.append(best)
    return torch.cat(chosen, 1)


def _lazy(worth: Tensor, keep: int, weight: Tensor | None, combination: str, least: float) -> list[int]:
    """The same for one sample, where gains are summed again only where they may decide."""
    bound = _score(worth.sum(1), weight, combination, least)
    nothing = _score(torch.zeros_like(bound), weight, combination, least)  # no bound is below the score of gain 0
    covered = worth.new_zeros(worth.shape[1])
    chosen: list[int] = []

    def renew(index: Tensor) -> Tensor:
        gain = worth.index_select(0, index).sub_(covered).relu_().sum(1)
        score = _score(gain, None if weight is None else weight.index_select(0, index), combination, least)
        bound.index_copy_(0, index, score)
        return score

    for step in range(keep):
        if step:
            index = bound.topk(min(_BLOCK, len(worth) - step)).indices
            score = renew(index)
            best = int(bound.argmax())
            # An old bound that is as high as the best new score must be looked at too: it may be a tie with a lower
            # index. What has nothing to gain any more has nothing to lose.
            if best not in index.tolist() and bool(bound[best] > nothing[best]):
                renew(((bound >= score.max()) & (bound > nothing)).nonzero().flatten())
                best = int(bound.argmax())
        else:
            best = int(bound.argmax())
        torch.maximum(covered, worth[best], out=covered)
        bound[best] = float("-inf")
        chosen.append(best)
    return chosen


def farthest(d: Tensor, keep: int) -> Tensor:
    """(B,K) greedy max-min choice from ``d`` (B,N,N) >= 0, the distance of candidate j from i at [i, j], in order.

    The first is the candidate whose nearest other one is farthest; every further one is farthest from the nearest of
    the chosen. Ties go to the lower index; nothing is chosen twice. ``keep`` is at most N.
    """
    n = d.shape[1]
    if keep < 1:
        return d.new_empty(len(d), 0, dtype=torch.long)
    own = torch.eye(n, dtype=torch.bool, device=d.device)
    chosen = [d.masked_fill(own, float("inf")).amin(1).argmax(1, keepdim=True)]
    far = torch.full_like(d[:, 0], float("inf"))
    for _ in range(keep - 1):
        last = chosen[-1]
        row = d.gather(1, last.unsqueeze(-1).expand(-1, 1, n)).squeeze(1)
        far = torch.minimum(far, row).scatter(1, last, float("-inf"))
        chosen.append(far.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)
