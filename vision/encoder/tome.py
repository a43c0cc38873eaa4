"""Token Merging, ToMe (arXiv 2210.09461), with its k-th variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.matching import bipartite, clamp_r
from tokenreduce.algorithms.scoring import ascending, finite, inner, key_metric, unit
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.reducer import Reducer, check_size_bias
from tokenreduce.core.schedule import Scheduled

__all__ = ["ToMe", "ToMeKth"]


@dataclass(frozen=True)
class ToMe(Scheduled, name="tome", needs=("keys",), paper="2210.09461", title="Token Merging"):
    """ToMe: every layer merges the ``r`` most similar pairs of an even/odd split, by keys averaged over heads.

    Args:
        r, inflect, keep: see :class:`Scheduled`. ``r`` above half of the free tokens is clamped and reported.
        prop_attn: attention logits get log(size) (the paper's proportional attention; the authors switch it off for
            MAE weights).
        size_bias: the power of sizes instead: "log" is ``prop_attn``, "sqrt" half of it, "none" 0, or a number in
            [0, 1]; None leaves it to ``prop_attn``.
        frames: in the vision tower of a video language model, so many consecutive frames of a video are merged as one
            image, across frames too; 1 leaves every frame alone. ``r`` and ``keep`` then count over these frames. On
            Qwen-VL a frame is a temporal position, which holds two.

    Raises ``ValueError`` for a negative ``r``, a bad ``keep``, ``frames`` or ``size_bias``, or a list longer than the
    model.
    """

    prop_attn: bool = True
    frames: int = 1
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size_bias(self.size_bias)
        check_count(self.frames, "frames", 1)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        return bipartite(key_metric(evidence), clamp_r(self.amount(evidence), evidence, self.name), evidence)


@dataclass(frozen=True)
class ToMeKth(Reducer, name="tome_kth", needs=("keys",), paper="2210.09461", title="ToMe, k-th variant"):
    """ToMe's k-th variant: in chosen layers every k-th patch absorbs all others, leaving N // k.

    Args:
        k: group length; position k-1 of each group is a destination.
        layers: 0-based layers that act.
        keep: instead of ``k``: the share or number of patches left, destinations evenly spaced among them.
        tail: the last N mod k patches are merged as well ("merge", so that no mass is lost) or dropped with their
            weight as the official code does ("drop").
        prop_attn, size_bias: as in :class:`ToMe`.
    """

    k: int = 2
    layers: tuple[int, ...] = (0,)
    keep: int | float | None = None
    tail: str = "merge"
    prop_attn: bool = True
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_size_bias(self.size_bias)
        check_count(self.k, "k", 1)
        check_keep(self.keep)
        if self.tail not in ("merge", "drop"):
            raise ValueError(f"tail is 'merge' or 'drop', not {self.tail!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self.layers

    def plan(self, evidence: EncoderEvidence) -> Plan:
        n, p = evidence.n, evidence.prefix
        free = n - p
        groups = count(self.keep, free) if self.keep is not None else free // min(self.k, max(1, free))
        if groups == free:
            return Identity.like(evidence.x)
        position = torch.arange(n, device=evidence.x.device)
        end = free if self.keep is not None or self.tail == "merge" else groups * self.k
        step = torch.arange(1, groups + 1, device=position.device)
        target = p + (step * free // groups if self.keep is not None else step * self.k) - 1
        chosen = torch.zeros(n, dtype=torch.bool, device=position.device).scatter(0, target, 1)
        # The number of sources is known, so this stays one graph where a boolean index would not.
        source = ascending(chosen[p : p + end].long())[: end - groups] + p
        m = unit(key_metric(evidence))
        scores = finite(inner(m[:, source], m[:, target]), evidence)
        keep = torch.cat([position[:p], target]).expand(evidence.batch, -1)
        return Merge(n, keep, source.expand(evidence.batch, -1), p + scores.argmax(-1))
