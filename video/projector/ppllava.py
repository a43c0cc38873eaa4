"""PPLLaVA (arXiv 2411.02327): windows of time, rows and columns become means weighted by the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import windows
from tokenreduce.algorithms.projector import check_clip, clip_named
from tokenreduce.algorithms.scoring import finite, inner, relevance, unit
from tokenreduce.algorithms.temporal import Temporal, frames_of
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Merge, Plan

__all__ = ["PPLLaVA"]

POOLINGS = ("window", "double")


@dataclass(frozen=True)
class PPLLaVA(Temporal, name="ppllava", needs=("text",), paper="2411.02327", title="PPLLaVA prompt-guided pooling"):
    """PPLLaVA: the video is cut into windows of neighbouring frames, rows and columns; the embeddings of a window
    become one, weighted by how near they are to the question. Windows follow by time, row and column.

    Relevance is, with ``clip``, the cosine between a patch and the question in CLIP's joint space, the mean over the
    segments of a question of more than 77 tokens (officially it is cut off, or read by an extended text tower).
    Without ``clip`` it is the mean cosine between the embedding of a token and those of the words of the question in
    the language model's own space; this port is ours. A sample without a word gets the plain mean of every window.

    Windows are exactly as many as tokens shall stay and do not overlap. They have the shape of ``kernel``, scaled to
    the size that the budget asks for: the frames are cut into bands, as many as come nearest to that shape (numbers
    that divide frames and windows evenly come first unless off by more than a factor of two; equally near: more bands),
    windows shared out evenly among the bands (the first take the rest), and the frames of a band cut into cells as in
    :func:`tokenreduce.algorithms.baseline.windows`. Where the kernel tiles the video and ``keep`` is the number of its
    tiles, these are the published windows; otherwise the official code leaves out frames, rows and columns that do not
    fill a window, or overlaps windows, and here nothing is left out. An output stands at the place of its window's
    first token. Weights depend on the question: another question needs another pass of the language model over the
    video.

    Args:
        keep: visual tokens of a video that stay; 1024 of 32 * 576 in the paper.
        kernel: frames, rows and columns of a window, which give windows their shape.
        pooling: "window" is a softmax over each window of ``logit_scale`` times the cosine. "double" is published: a
            softmax of that over the whole video, divided by ``pooling_temp``, goes through a softmax in each window,
            which is close to the plain mean unless single tokens hold more than half a percent of the whole video; the
            weights then depend on the number of frames.
        logit_scale: factor on cosines; 100 is that of CLIP.
        pooling_temp: temperature of the second softmax of "double".
        clip: Hub id or folder of the CLIP model that the vision tower is from, such as
            "openai/clip-vit-large-patch14-336", or an embedded one; None for relevance in the language model's space;
            "auto" for the one that the language model names in its config, and None where it names none.
        sign: factor on the cosine, -1 or 1; None is 1, as published.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these, and for frames whose tokens share a place.
    """

    keep: int | float = 1024
    kernel: tuple[int, int, int] = field(default=(2, 3, 3), kw_only=True)
    pooling: str = field(default="window", kw_only=True)
    logit_scale: float = field(default=100.0, kw_only=True)
    pooling_temp: float = field(default=0.01, kw_only=True)
    clip: str | None = field(default=None, kw_only=True)
    sign: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip, self.sign)
        if not isinstance(self.kernel, Sequence) or isinstance(self.kernel, str) or len(self.kernel) != 3:
            raise ValueError(f"kernel is three numbers, of frames, rows and columns, not {self.kernel!r}")
        object.__setattr__(self, "kernel", tuple(self.kernel))
        for side in self.kernel:
            check_count(side, "kernel", 1)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {POOLINGS}, not {self.pooling!r}")
        for name in ("logit_scale", "pooling_temp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is a finite number above 0, not {value!r}")

    def required(self) -> tuple[str, ...]:
        return ("clip",) if clip_named(self.clip) else ("text",)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        t, n = frames_of(evidence)
        p, b = evidence.prefix, evidence.batch
        window = windows(evidence, keep, self.bands(t, n, keep), self.kernel[1] / self.kernel[2])
        logits = self.similarity(evidence) * self.logit_scale
        if self.pooling == "double":
            logits = logits.softmax(1) / self.pooling_temp
        at = window.expand(b, -1)
        highest = torch.full((b, keep), float("-inf"), device=logits.device).scatter_reduce(1, at, logits, "amax")
        # The mean of a merge divides by the sum of a window: its softmax.
        weights = torch.cat([logits.new_ones(b, p), (logits - highest.gather(1, at)).exp()], 1)
        assign = torch.cat([torch.arange(p, device=at.device).expand(b, -1), at + p], 1)
        return Merge.from_assignment(assign, p + keep, weights=weights, by_size=False)

    def bands(self, t: int, n: int, keep: int) -> int:
        """Into how many bands of time ``t`` frames of ``n`` tokens are cut for ``keep`` windows."""
        scale = (t * n / keep / math.prod(self.kernel)) ** (1 / 3)
        wanted = max(t / (self.kernel[0] * scale), 1e-9)

        def rank(bands: int) -> tuple[bool, float, int]:
            skew = round(abs(math.log(bands / wanted)), 9)
            even = not t % bands and not keep % bands and skew <= round(math.log(2), 9)
            return not even, skew, -bands

        return min(range(-(-keep // n), min(t, keep) + 1), key=rank)

    def similarity(self, evidence: VisualEvidence) -> Tensor:
        """(B,N) float32 cosines of the tokens behind the prefix to the question, times the sign; 0 without a word."""
        if not clip_named(self.clip):
            cosine = relevance(evidence)
        else:
            patches, text = evidence.clip
            text = unit(text.detach())
            there = (text != 0).any(-1).sum(1).clamp(min=1)
            mean = text.sum(1, keepdim=True) / there[:, None, None]
            patches = patches.detach()[:, patches.shape[1] - (evidence.n - evidence.prefix) :]
            cosine = inner(unit(patches), mean).squeeze(-1)
        return finite(cosine * (self.sign or 1), evidence).clamp(-1, 1)
