"""vid-TLDR (arXiv 2403.13347): merge early in a video transformer, background tokens without weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.algorithms.matching import bipartite, clamp_r
from tokenreduce.algorithms.scoring import excluded, finite
from tokenreduce.core.budget import check_count, check_either
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.reducer import Reducer, check_size_bias
from tokenreduce.core.schedule import staged

__all__ = ["VidTLDR"]


@dataclass(frozen=True)
class VidTLDR(
    Reducer, name="vid-tldr", stage="encoder", needs=("attention",), paper="2403.13347", title="vid-TLDR",
):  # fmt: skip
    """vid-TLDR: in the first blocks, merge similar tokens, each source weighted by how salient it is.

    A token is salient when its attention row (mean over heads, without size bias) is sharp, that is of low entropy.
    Saliency is 0 below the mean over the tokens (background), and grows linearly to 1 at the sharpest token. Even
    positions look for their most similar odd one (cosine of the features); the best ones join it with mass and weight
    multiplied by their saliency, so that background leaves no trace: such a source counts as dropped. Mass is
    fractional and no longer adds up to the number of tokens. For video transformers with joint space-time attention,
    and for images.

    Args:
        r: tokens removed in each of the first blocks, a list of counts (int) or shares of the unprotected tokens
            (float below 1, rounded down). At most half of them go; a number that is clamped is reported. The paper's
            lists are meant for one number of tokens, for instance [600, 200, 100] for 2352; shares fit any.
        keep: instead of ``r``: patch tokens left after the last block, a count or a ratio, reached by equal ratios in
            the first ``blocks`` blocks. An extension of this library.
        blocks: blocks that share ``keep``; four, the most that published lists have, can reach one sixteenth.
        prop_attn: attention logits get log(mass), as in the paper; saliency is always measured without.
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1]; None leaves it to ``prop_attn``.
        frames: in the vision tower of a video language model, which sees one frame at a time, so many consecutive
            frames are merged as one clip; saliency is still over the frame that a token attends to. An extension.

    Points of this implementation. Protected tokens take no part: they are not scored, do not move, do not absorb and
    come first; a row's entropy is over all tokens that it attends to, protected ones included. Where all scores are
    the same up to rounding (1e-5 of their size) every weight is 1; the official code divides 0 by 0 there, and takes
    the logarithm of 0 in a one-hot row. The mean over heads comes before the entropy, so rows are computed in parts
    and no N x N map is held. Saliency carries no gradient.

    Raises ``ValueError`` for a bad ``r``, ``keep``, ``blocks`` or ``frames``, both ``r`` and ``keep``, or a list longer
    than the model.
    """

    r: Sequence[int | float] = ()
    keep: int | float | None = None
    blocks: int = 4
    prop_attn: bool = True
    frames: int = 1
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_size_bias(self.size_bias)
        if isinstance(self.r, str) or not isinstance(self.r, Sequence):
            raise ValueError(
                f"r is a list with a number for each of the first blocks such as [200, 100], not {self.r!r}"
            )
        for value in self.r:
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and not (isinstance(value, float) and 0 <= value < 1):
                raise ValueError(f"r lists numbers of tokens (int >= 0) or shares (float in [0, 1)), not {value!r}")
        object.__setattr__(self, "r", tuple(self.r))
        check_either(self.keep, bool(self.r))
        check_count(self.blocks, "blocks", 1)
        check_count(self.frames, "frames", 1)

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.keep is not None:
            return layer < self.blocks and not (isinstance(self.keep, float) and self.keep == 1)
        if len(self.r) > depth:
            raise ValueError(f"r lists {len(self.r)} layers but the model has {depth}")
        return layer < len(self.r) and self.r[layer] > 0

    def amount(self, evidence: EncoderEvidence) -> int:
        """Tokens to remove at this layer."""
        layer = evidence.layer
        if not self.acts_at(layer, max(evidence.depth, len(self.r))):
            return 0
        if self.keep is not None:
            return max(0, evidence.free() - staged(self.keep, evidence, tuple(range(min(self.blocks, evidence.depth)))))
        return int(evidence.free() * self.r[layer]) if self.r[layer] < 1 else int(self.r[layer])

    def plan(self, evidence: EncoderEvidence) -> Plan:
        r = clamp_r(self.amount(evidence), evidence, self.name)
        if r == 0:
            return Identity.like(evidence.x)
        plan = bipartite(evidence.x.detach(), r, evidence, ascending=True)
        assert isinstance(plan, Merge)
        share = _saliency(evidence).gather(1, plan.src)
        weights = torch.ones(evidence.batch, evidence.n, device=share.device).scatter(1, plan.src, share)
        return replace(plan, weights=weights, size_scale=share)


def _sharpness(evidence: EncoderEvidence, chunk: int = 256) -> Tensor:
    """(B,N) sum of p log p over every token's attention row p, which is averaged over heads and has no size bias."""
    if evidence.attention.given is not None:
        row = evidence.attention("all").mean(1)
        return torch.xlogy(row, row).sum(-1)
    plain = evidence.attention.unbiased()
    parts = []
    for start in range(0, evidence.n, chunk):
        at = torch.arange(start, min(start + chunk, evidence.n), device=evidence.x.device)
        row = plain(at).mean(1)
        parts.append(torch.xlogy(row, row).sum(-1))
    return torch.cat(parts, 1)


def _saliency(evidence: EncoderEvidence) -> Tensor:
    """(B,N) in [0,1]: 0 for tokens less sharp than their mean, 1 for the sharpest; 0 for tokens that are not there.

    The scores of protected tokens have no meaning. Scaling to [0,1] first, as the paper does, cancels out.
    """
    p = evidence.prefix
    score = finite(_sharpness(evidence), evidence).detach()[:, p:]
    absent = excluded(evidence)
    there = torch.ones_like(score) if absent is None else (~absent).float()
    mean = (score * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    above = (score - mean) * there
    highest = above.amax(1, keepdim=True)
    flat = highest <= 1e-5 * mean.abs()  # the same up to rounding
    share = (above / highest.clamp(min=torch.finfo(above.dtype).tiny)).clamp(0, 1)
    share = torch.where(flat, 1.0, share) * there
    return torch.nn.functional.pad(share, (p, 0), value=1.0)
