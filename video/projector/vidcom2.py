"""VidCom2 (arXiv 2505.14454): keep the tokens that are unlike their frame and unlike the video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import kept
from tokenreduce.algorithms.scoring import finite, unit
from tokenreduce.algorithms.temporal import Temporal, best_of_frames, by_frame
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Identity, Plan, Prune

__all__ = ["VidCom2"]


@dataclass(frozen=True)
class VidCom2(Temporal, name="vidcom2", paper="2505.14454", title="VidCom2"):
    """VidCom2: the tokens least similar to the mean of their frame and to that of the video, more in unusual frames.

    Only the ``channels`` of lowest variance over the video count; on them tokens have unit length. The similarity of a
    token to a mean m is the sum of exp(-|f - m|^2 / 2a) over ``bandwidths`` a; v is that to the video's mean, u that to
    the frame's. With R the ratio to keep and p the softmax over frames of -mean(v) / ``temperature``, a frame keeps the
    round(n min(R (1 + p - mean p), 1)) tokens with the smallest u + v, at least one, in raster order.

    These counts need not sum to ``keep``. Then, as in serving engines, of all tokens chosen those with the largest
    u + v go, or of the others those with the smallest are added, over the whole video; going may leave a frame without
    a token. Ties go to the lower index, rounding is half to even, scores are float32, and at least one channel counts.

    Args:
        keep: a ratio is R itself, a count over all tokens otherwise.
        channels: share of the channels that count, in (0, 1].
        temperature: of the softmax over frames, > 0. At 0.01 one frame can take nearly 2 R; similar ones share evenly.
        bandwidths: a of the Gaussians, > 0.
        plain: leave the counts as they come, as the authors' code does: near ``keep`` but not exactly, and samples of a
            batch may differ, with empty slots on the left.
        positions, newlines: see :class:`~tokenreduce.algorithms.temporal.Temporal`.

    Raises ``ValueError`` for values other than these.
    """

    keep: int | float = 0.25
    channels: float = 0.5
    temperature: float = 0.01
    bandwidths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    plain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _positive(self.channels) or self.channels > 1:
            raise ValueError(f"channels is a share in (0, 1], not {self.channels!r}")
        if not _positive(self.temperature):
            raise ValueError(f"temperature is a finite number > 0, not {self.temperature!r}")
        if not isinstance(self.bandwidths, tuple) or not self.bandwidths or not all(map(_positive, self.bandwidths)):
            raise ValueError(f"bandwidths is a tuple of finite numbers > 0, not {self.bandwidths!r}")
        if not isinstance(self.plain, bool):
            raise ValueError(f"plain is True or False, not {self.plain!r}")

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        to_video, to_frame = self.similarity(by_frame(evidence))
        usual = finite(to_video + to_frame, evidence)
        ratio = self.keep if isinstance(self.keep, float) else keep / usual[0].numel()
        stay = best_of_frames(-usual, self.quota(to_video, ratio)).flatten(1)
        if self.plain:
            front = torch.ones(len(stay), evidence.prefix, dtype=torch.bool, device=stay.device)
            stay = torch.cat([front, stay], 1)
            return Identity.like(evidence.x) if bool(stay.all()) else Prune.from_mask(stay)
        order = usual.flatten(1).argsort(dim=1, stable=True)
        chosen_first = stay.gather(1, order).long().argsort(dim=1, descending=True, stable=True)
        return kept(order.gather(1, chosen_first[:, :keep]), evidence)

    def similarity(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B,T,n) similarities of tokens ``x`` (B,T,n,C) to the video's mean, and to that of their frame."""
        variance = x.flatten(1, 2).var(1, correction=0)
        count = max(1, int(x.shape[-1] * self.channels))
        quiet = variance.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        f = unit(x.gather(3, quiet[:, None, None].expand(*x.shape[:3], -1)))
        centres = f.mean(2, keepdim=True)
        video = f.flatten(1, 2).mean(1)[:, None]
        # Frame by frame: differences of all tokens at once would take as much memory as the features.
        pairs = [(self._alike(f[:, t], video), self._alike(f[:, t], centres[:, t])) for t in range(x.shape[1])]
        return torch.stack([v for v, _ in pairs], 1), torch.stack([u for _, u in pairs], 1)

    def _alike(self, f: Tensor, mean: Tensor) -> Tensor:
        """(B,n) sum of Gaussians of the distances of ``f`` (B,n,c) from ``mean`` (B,1,c)."""
        d = (f - mean).square().sum(-1)
        return torch.stack([(-d / (2 * a)).exp() for a in self.bandwidths]).sum(0)

    def quota(self, to_video: Tensor, ratio: float) -> Tensor:
        """(B,T) tokens of every frame, before they are made to sum to the budget."""
        n = to_video.shape[2]
        p = (-to_video.double().mean(2) / self.temperature).softmax(1)
        scale = (ratio * (1 + p - p.mean(1, keepdim=True))).clamp(max=1)
        return (scale * n).round().clamp(1, n).long()


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < float("inf")
