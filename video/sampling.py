"""Which frames of a video: pure functions of numbers, with sorted indices out.

Sources: the spacing of LLaVA's code; Adaptive Keyframe Sampling, arXiv 2502.21271; farthest-point (max-min) diversity
as used on tokens by arXiv 2503.02175. ``pairs=True`` is for models whose temporal patches hold two frames (Qwen-VL):
candidates 2j and 2j+1 are chosen together, so that no patch mixes frames that lie far apart; the last of an odd number
is paired with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["aks", "at_times", "by_fps", "max_min", "pairs", "uniform"]

#: Seconds by which containers round timestamps (Matroska, FLV: to milliseconds).
ROUNDING = 1e-3
#: Cosine distance up to which frames are the same picture.
SAME = 1e-6


def uniform(count: int, n: int, *, repeat: bool = False, pairs: bool = False) -> list[int]:
    """``n`` of ``count`` frames, evenly, both ends included: linspace(0, count - 1, n) cut to integers, as LLaVA does,
    but computed in integers, where floats can fall one short. n = 1 gives the first frame.

    Fewer frames than n: each once, or, with ``repeat``, n of them by the same formula.
    """
    _check(count, n, pairs)
    if pairs:
        return _in_pairs(count, lambda units: uniform(units, n // 2, repeat=repeat))
    if n >= count and not repeat:
        return list(range(count))
    return [i * (count - 1) // max(n - 1, 1) for i in range(n)]


def by_fps(times: ArrayLike, fps: float, duration: float | None = None, *, most: int | None = None) -> list[int]:
    """The frames on screen at 0, 1/fps, 2/fps, ... seconds after the first, each at most once.

    Args:
        times: (count,) seconds, ascending: true timestamps, so that a variable rate, or one below ``fps``, is right.
        fps: frames per second, > 0; not rounded, 29.97 stays 29.97.
        duration: seconds at which the last frame ends; that of the last frame's time when None.
        most: thin out evenly, as :func:`uniform`, to at most this many.
    """
    stamps = _times(times)
    if isinstance(fps, bool) or not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is a number > 0, not {fps!r}")
    end = float(stamps[-1] - stamps[0]) if duration is None else duration
    # A frame that begins just when the film ends would be one too many: 10 s at 1 fps are 10 frames.
    steps = max(1, math.ceil(end * fps - ROUNDING)) if duration is not None else math.floor(end * fps + ROUNDING) + 1
    if steps > 4 * len(stamps):
        chosen = list(range(len(stamps)))  # far faster than the video
    else:
        chosen = sorted(set(at_times(stamps, stamps[0] + np.arange(steps) / fps)))
    if most is not None:
        chosen = [chosen[i] for i in uniform(len(chosen), most)]
    return chosen


def at_times(times: ArrayLike, seconds: ArrayLike) -> list[int]:
    """Index of the frame on screen at each of ``seconds``: the last that is not later. Timestamps are rounded in files,
    so a frame counts as shown up to a millisecond, or a third of the shortest step, before its time."""
    stamps = _times(times)
    steps = np.diff(stamps)
    early = min(ROUNDING, float(steps.min()) / 3) if len(steps) else ROUNDING
    at = np.searchsorted(stamps, np.asarray(seconds, np.float64) + early, side="right") - 1
    return [int(i) for i in np.maximum(at, 0)]


def aks(
    scores: ArrayLike, n: int, t1: float = 0.8, t2: float = -100.0, depth: int = 5, *, pairs: bool = False
) -> list[int]:
    """Adaptive Keyframe Sampling (arXiv 2502.21271): ``n`` frames by relevance, spread over the video.

    A bin of frames is taken whole when its best frames stand out: mean of its best n minus its mean above ``t1``, and
    standard deviation above ``t2``, of scores that are min-max normalised over the video. Otherwise it is halved, up to
    ``depth`` times. A bin at depth d gives its n/2^d best frames.

    Where the published code falls short: depth is at most log2(n), so that no bin gives nothing; what integer division
    leaves over goes to the half with the higher mean (the first, if equal), and what a short bin cannot give to its
    sibling, so that exactly min(n, count) frames come out; scores that are all equal say nothing and give
    :func:`uniform`. With ``pairs`` a pair has the mean of its scores.

    Raises ``ValueError`` for settings out of range, or scores that are not finite.
    """
    values = np.asarray(scores, np.float64).reshape(-1)
    _check(len(values), n, pairs)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"depth is an int >= 0, not {depth!r}")
    if not np.isfinite(values).all():
        raise ValueError("scores are finite numbers, one per frame")
    if pairs:
        means = np.array([values[i : i + 2].mean() for i in range(0, len(values), 2)])
        return _in_pairs(len(values), lambda units: aks(means, n // 2, t1, t2, depth))
    low, high = values.min(), values.max()
    if n >= len(values) or high == low:
        return uniform(len(values), n)
    values = (values - low) / (high - low)
    deepest = min(depth, int(math.log2(n)))
    out: list[int] = []

    def take(start: int, stop: int, quota: int, at: int) -> None:
        inside = values[start:stop]
        best = np.argsort(-inside, kind="stable")
        stands_out = inside[best[:n]].mean() - inside.mean() > t1 and inside.std() > t2
        if stands_out or at == deepest or quota < 2 or len(inside) < 2:
            out.extend(int(start + i) for i in best[:quota])
            return
        middle = start + len(inside) // 2
        richer = values[start:middle].mean() >= values[middle:stop].mean()
        left = quota // 2 + (quota % 2 if richer else 0)
        left = min(max(left, quota - (stop - middle)), middle - start)
        take(start, middle, left, at + 1)
        take(middle, stop, quota - left, at + 1)

    take(0, len(values), n, 0)
    return sorted(out)


def max_min(
    features: ArrayLike, n: int, relevance: ArrayLike | None = None, *, weight: float = 0.5, pairs: bool = False
) -> list[int]:
    """``n`` frames that differ most: farthest-point sampling by cosine distance.

    The first is the frame farthest from its nearest other, or the most relevant one; then always the frame whose
    nearest chosen one is farthest. Ties go to the lower index.

    Args:
        features: (count, E), one embedding per frame.
        n: frames.
        relevance: (count,), higher is more relevant. Scaled to r in 0..1, a distance counts (1 - weight + weight * r)
            times. As a factor it cannot make a near-duplicate worth choosing, which is how choice by relevance alone
            collapses. All equal, it says nothing and is left out.
        weight: of relevance, 0 to 1.
        pairs: a pair has the mean of its embeddings and relevances.

    When only copies of chosen frames are left (a still picture), the rest is spread over time instead of taken from the
    beginning: the frame farthest in time from those chosen.

    Raises ``ValueError`` for shapes that do not fit, numbers that are not finite, settings out of range.
    """
    rows = np.asarray(features, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"features has shape (count, E), not {rows.shape}")
    count = len(rows)
    _check(count, n, pairs)
    worth = None if relevance is None else np.asarray(relevance, np.float64).reshape(-1)
    if worth is not None and len(worth) != count:
        raise ValueError(f"relevance has one number per frame, {count}, not {len(worth)}")
    if not np.isfinite(rows).all() or (worth is not None and not np.isfinite(worth).all()):
        raise ValueError("features and relevance are finite numbers")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is 0 to 1, not {weight!r}")
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if pairs:
        units = np.stack([rows[i : i + 2].mean(0) for i in range(0, count, 2)])
        means = None if worth is None else np.array([worth[i : i + 2].mean() for i in range(0, count, 2)])
        return _in_pairs(count, lambda _: max_min(units, n // 2, means, weight=weight))
    if n >= count:
        return list(range(count))
    factor = np.ones(count)
    if worth is not None and worth.max() > worth.min():
        factor = 1 - weight + weight * (worth - worth.min()) / (worth.max() - worth.min())
        first = int(worth.argmax())
    else:
        first = _loneliest(rows)
    chosen = [first]
    near = 1 - rows @ rows[first]
    apart = np.abs(np.arange(count) - first).astype(np.float64)
    for _ in range(n - 1):
        gain = np.where(near > SAME, near * factor, 0.0)
        gain[chosen] = -1.0
        if gain.max() <= 0:
            gain = apart.copy()
            gain[chosen] = -1.0
        pick = int(gain.argmax())
        chosen.append(pick)
        near = np.minimum(near, 1 - rows @ rows[pick])
        apart = np.minimum(apart, np.abs(np.arange(count) - pick))
    return sorted(chosen)


def pairs(units: Sequence[int], count: int) -> list[int]:
    """Frames of pairs: unit j is frames 2j and 2j+1 of ``count``, or the last one twice."""
    return [min(i, count - 1) for j in units for i in (2 * j, 2 * j + 1)]


def _in_pairs(count: int, choose: Callable[[int], list[int]]) -> list[int]:
    return pairs(choose((count + 1) // 2), count)


def _loneliest(rows: NDArray[Any], block: int = 1024) -> int:
    """The row farthest from its nearest other, without a (count, count) matrix."""
    nearest = np.empty(len(rows))
    for at in range(0, len(rows), block):
        distance = 1 - rows[at : at + block] @ rows.T
        distance[np.arange(len(distance)), at + np.arange(len(distance))] = np.inf
        nearest[at : at + block] = distance.min(1)
    # Equal up to rounding is equal: the product is not exactly symmetric.
    return int((nearest >= nearest.max() - SAME).argmax())


def _check(count: int, n: int, paired: bool) -> None:
    for name, value in (("count", count), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is an int >= 1, not {value!r}")
    if paired and n % 2:
        raise ValueError(f"pairs need an even n, not {n}")


def _times(times: ArrayLike) -> NDArray[np.float64]:
    stamps = np.asarray(times, np.float64).reshape(-1)
    if not len(stamps) or not np.isfinite(stamps).all() or (np.diff(stamps) < 0).any():
        raise ValueError("times are finite seconds in ascending order, at least one")
    return stamps
