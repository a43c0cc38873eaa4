"""Greedy choices that several methods share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

__all__ = ["cover", "farthest", "volume"]

#: Candidates that are looked at again in every step before the others; more cost time, fewer miss the best too often.
_BLOCK = 8
#: Share of a candidate's own kernel entry below which what is left of it is rounding.
_RANK = 1e-5


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
    """The same for one sample, where gains are summed again only where they may decide.

    Steps are short and many, and numpy starts its operators several times faster than torch; sums alone are torch's, so
    that they round as in :func:`_plain`.
    """
    n = len(worth)
    scores = _score(worth.sum(1), weight, combination, least)
    floors = _score(torch.zeros_like(scores), weight, combination, least)  # no bound is below the score of gain 0
    bound, floor, rows = scores.numpy(), floors.numpy(), worth.numpy()
    extra = None if weight is None else weight.numpy()
    covered = np.zeros_like(rows[0])
    size = min(_BLOCK, n)
    usual = _room(size, worth.shape[1])
    front = torch.empty(size), torch.empty(size, dtype=torch.long)
    places = front[1].numpy()
    chosen: list[int] = []

    def renew(index: np.ndarray) -> np.ndarray:
        block, left, sums, gain = usual if len(index) == size else _room(len(index), worth.shape[1])
        rows.take(index, 0, left, "clip")
        np.subtract(left, covered, out=left)
        torch.sum(block.relu_(), 1, out=sums)
        if least > 0:
            gain[gain <= least] = 0
        if extra is not None:
            (np.multiply if combination == "product" else np.add)(gain, extra[index], out=gain)
        bound[index] = gain
        return gain

    for step in range(keep):
        best = int(bound.argmax())
        if step:
            torch.topk(scores, size, sorted=n - step < size, out=front)
            index = places[: n - step]  # behind them are those that were taken
            score = renew(index).max()
            best = int(bound.argmax())
            # An old bound that is as high as the best new score must be looked at too: it may be a tie with a lower
            # index. What has nothing to gain any more has nothing to lose.
            if best not in index.tolist() and bound[best] > floor[best]:
                renew(((bound >= score) & (bound > floor)).nonzero()[0])
                best = int(bound.argmax())
        np.maximum(covered, rows[best], out=covered)
        bound[best] = -np.inf
        chosen.append(best)
    return chosen


def _room(rows: int, parts: int) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
    """A block (rows,parts) and the sums of its rows, in torch and in numpy."""
    block, sums = torch.empty(rows, parts), torch.empty(rows)
    return block, block.numpy(), sums, sums.numpy()


def farthest(d: Tensor, keep: int) -> Tensor:
    """(B,K) greedy max-min choice from ``d`` (B,N,N) >= 0, the distance of candidate j from i at [i, j], in order.

    The first is the candidate whose nearest other one is farthest; every further one is farthest from the nearest of
    the chosen. Ties go to the lower index; nothing is chosen twice. ``keep`` is at most N.
    """
    n = d.shape[1]
    if keep < 1:
        return d.new_empty(len(d), 0, dtype=torch.long)
    own = torch.eye(n, dtype=torch.bool, device=d.device)
    first = d.masked_fill(own, float("inf")).amin(1).argmax(1)
    if d.device.type != "cpu" or torch.compiler.is_compiling():
        return _spread(d, keep, first)
    rows = [_spread_row(d[b], keep, int(first[b])) for b in range(len(d))]
    return torch.tensor(rows, dtype=torch.long).view(len(d), keep)


def _spread(d: Tensor, keep: int, first: Tensor) -> Tensor:
    """:func:`farthest` behind ``first`` (B,), all samples at once."""
    n = d.shape[1]
    chosen, far = [first.unsqueeze(1)], torch.full_like(d[:, 0], float("inf"))
    for _ in range(keep - 1):
        last = chosen[-1]
        row = d.gather(1, last.unsqueeze(-1).expand(-1, 1, n)).squeeze(1)
        far = torch.minimum(far, row).scatter(1, last, float("-inf"))
        chosen.append(far.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def _spread_row(d: Tensor, keep: int, first: int) -> list[int]:
    """The same for one sample on the CPU, where numpy starts short operators faster than torch."""
    rows = d.detach().numpy()
    chosen, far = [first], np.full_like(rows[0], np.inf)
    for _ in range(keep - 1):
        np.minimum(far, rows[chosen[-1]], out=far)
        far[chosen[-1]] = -np.inf
        chosen.append(int(far.argmax()))
    return chosen


def volume(kernel: Tensor, own: Tensor, quality: Tensor, keep: int) -> Tensor:
    """(B,K) greedy most probable set of the determinantal point process with ``kernel`` (B,N,N), in order of choice:
    every step takes the candidate that makes the determinant of the chosen part largest; ties to the lower index.

    Args:
        kernel: float32, positive semidefinite.
        own: (B,N) its diagonal, which may be freed of rounding where equal candidates must tie.
        quality: (B,N) > 0. Candidates that the chosen ones span to rounding come last, by descending quality.
        keep: K, at most N.
    """
    if not keep:
        return own.new_empty(len(own), 0, dtype=torch.long)
    if kernel.device.type != "cpu" or torch.compiler.is_compiling():
        return _volume(kernel, own, quality, keep)
    rows = [_volume_row(kernel[b].detach(), own[b].detach(), quality[b].detach(), keep) for b in range(len(kernel))]
    return torch.tensor(rows, dtype=torch.long).view(len(kernel), keep)


def _volume(kernel: Tensor, own: Tensor, quality: Tensor, keep: int) -> Tensor:
    """All samples at once."""
    batch, n = own.shape
    gain, least, rest = own, own * _RANK, -1 / quality  # below every gain, and keeps the order to all digits
    first = torch.arange(batch, device=own.device) * n
    rows, chosen = kernel.new_empty(batch, keep, n), []
    with torch.autocast(kernel.device.type, enabled=False):
        for t in range(keep):
            alive, best = torch.where(gain > least, gain, rest).max(1, keepdim=True)
            row = kernel.view(-1, n).index_select(0, best[:, 0] + first).unsqueeze(1)
            if t:
                past = rows[:, :t].gather(2, best.unsqueeze(1).expand(-1, t, -1))
                row = row.baddbmm_(past.transpose(1, 2), rows[:, :t], alpha=-1)
            # A token that adds nothing leaves the others as they are; its square root would be of rounding.
            new = torch.mul(row[:, 0], threshold(alive, 0.0, float("inf")).rsqrt_(), out=rows[:, t])
            gain = gain.addcmul(new, new, value=-1).scatter_(1, best, float("-inf"))
            rest = rest.scatter(1, best, float("-inf"))
            chosen.append(best)
    return torch.cat(chosen, 1)


def _volume_row(kernel: Tensor, own: Tensor, quality: Tensor, keep: int) -> list[int]:
    """One sample on the CPU."""
    gain, rest = own.numpy().copy(), (-1 / quality).numpy()
    least = gain * np.float32(_RANK)
    rows, chosen = torch.empty(keep, len(gain)), []
    new, one = rows.numpy(), np.float32(1)
    with torch.autocast("cpu", enabled=False):
        for t in range(keep):
            best = int(gain.argmax())
            if not gain[best] > least[best]:  # a larger gain that is rounding may hide one that is not
                best = int(np.where(gain > least, gain, rest).argmax())
            if t:
                past = torch.from_numpy(new[:t, best].copy())
                torch.addmm(kernel[best : best + 1], past.unsqueeze(0), rows[:t], alpha=-1, out=rows[t : t + 1])
            else:
                rows[0] = kernel[best]
            new[t] *= one / np.sqrt(gain[best]) if gain[best] > least[best] else 0
            gain -= new[t] * new[t]
            gain[best] = rest[best] = -np.inf
            chosen.append(best)
    return chosen
