"""INTP (arXiv 2409.12963): more frames through a video encoder that takes a fixed number of them.

This adds tokens, and is no reducer: frames are dealt out to several passes of the encoder, each of which sees the whole
video, and their tokens are put back into the order of time; a reducer then acts on all of them, with their true times.
It is for encoders that attend across the frames of a clip (Video-LLaVA). Encoders that see single frames need only a
larger batch, and those that join neighbouring frames (Qwen-VL) must not have them dealt out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.core.budget import check_count

__all__ = ["interleave", "ntk_base", "subsequences"]


def subsequences(frames: int, n: int) -> Tensor:
    """(m,n) int64: the frames that every pass of an encoder for ``n`` frames sees; m = ceil(frames / n).

    Pass a sees frames a, a+m, a+2m, ... Slots behind the last frame repeat it; :func:`interleave` leaves them out.
    Raises ``ValueError`` for numbers below 1.

    >>> subsequences(7, 4).tolist()
    [[0, 2, 4, 6], [1, 3, 5, 6]]
    """
    check_count(frames, "frames", 1)
    check_count(n, "n", 1)
    m = -(-frames // n)
    return torch.arange(m * n).view(n, m).T.clamp(max=frames - 1).contiguous()


def interleave(tokens: Tensor, frames: int) -> Tensor:
    """(frames,...) in the order of time, from ``tokens`` (m,n,...): what m passes gave for n frames each.

    Frame f of pass a goes to slot f m + a. Raises ``ValueError`` when these are not the passes of that many frames.

    >>> interleave(subsequences(7, 4), 7).tolist()
    [0, 1, 2, 3, 4, 5, 6]
    """
    check_count(frames, "frames", 1)
    if tokens.dim() < 2 or tokens.shape[0] != -(-frames // max(tokens.shape[1], 1)):
        raise ValueError(
            f"{frames} frames come from tokens (m,n,...) with m = ceil({frames} / n) passes, not {tuple(tokens.shape)}"
        )
    return tokens.transpose(0, 1).flatten(0, 1)[:frames]


def ntk_base(base: float, s: float, d: int) -> float:
    """Rotary base for a context ``s`` times as long as the trained one (NTK-aware scaling): base * s^(d / (d - 2)).

    ``d`` is the dimension of a head. The slowest rotation then turns s times as slowly, the fastest as before. A
    context that is no longer (s <= 1) keeps the base. It changes the positions of text too, and is not enough for large
    factors (64 frames for a model trained on 8 collapse in the paper); a model's own long-context settings come first.
    Raises ``ValueError`` for a base or s that is not finite and above 0, and for d that is odd or below 4.

    >>> ntk_base(10000.0, 1.0, 128), round(ntk_base(10000.0, 2.0, 128), 1)
    (10000.0, 20221.3)
    """
    for name, value in (("base", base), ("s", s)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is a finite number above 0, not {value!r}")
    check_count(d, "d", 4)
    if d % 2:
        raise ValueError(f"d is the even dimension of a head, not {d}")
    return base * max(s, 1.0) ** (d / (d - 2))
