"""Token Merging, ToMe (arXiv 2210.09461), with its k-th and random variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenreduce.budget import check_count, check_keep, count, layer_schedule, linear
from tokenreduce.evidence import Evidence
from tokenreduce.matching import bipartite, clamp_r
from tokenreduce.plan import Identity, Merge, Plan
from tokenreduce.reducer import Reducer
from tokenreduce.scoring import finite, key_metric, unit

__all__ = ["ToMe", "ToMeKth"]


@dataclass(frozen=True)
class Scheduled(Reducer):
    """Settings shared by methods that remove ``r`` tokens per layer.

    ``r`` is a number for every layer, ``(r, inflection)`` as in ToMe's code (or ``r`` with ``inflect``), or a list
    with one number per layer. ``keep`` instead of ``r`` names what is left of the patch tokens after the last layer,
    a count or a ratio, reached by equal steps.
    """

    r: int | Sequence[int] = 0
    inflect: float = 0.0
    keep: int | float | None = None

    def __post_init__(self) -> None:
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
            object.__setattr__(self, "inflect", r[1])
            object.__setattr__(self, "r", r[0])
        elif isinstance(r, Sequence) and not isinstance(r, str):
            object.__setattr__(self, "r", tuple(r))
        check_keep(self.keep)
        layer_schedule(self.r, len(self.r) if isinstance(self.r, tuple) else 1, self.inflect)
        if self.keep is not None and self.r != 0:
            raise ValueError("give r or keep, not both")

    def acts(self, layer: int, depth: int) -> bool:
        return self.keep is not None or layer_schedule(self.r, depth, self.inflect)[layer] > 0

    def amount(self, evidence: Evidence) -> int:
        """Tokens to remove at this layer."""
        if self.keep is not None:
            protected = evidence.n - evidence.free()
            left = linear(self.keep, evidence.entry - protected, evidence.layer, evidence.depth)
            return max(0, evidence.free() - left)
        depth = max(evidence.depth, len(self.r) if isinstance(self.r, tuple) else 1)
        return layer_schedule(self.r, depth, self.inflect)[evidence.layer]


@dataclass(frozen=True)
class ToMe(Scheduled, name="tome", needs=("keys",), paper="2210.09461", title="Token Merging"):
    """ToMe: every layer merges the ``r`` most similar pairs of an even/odd split, by keys averaged over heads.

    Args:
        r, inflect, keep: see :class:`Scheduled`. ``r`` above half of the free tokens is clamped and reported.
        prop_attn: attention logits get log(size) (the paper's proportional attention; the authors switch it off for
            MAE weights).

    Raises ``ValueError`` for a negative ``r``, a bad ``keep`` or a list longer than the model.
    """

    prop_attn: bool = True

    def plan(self, evidence: Evidence) -> Plan:
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
        prop_attn: as in :class:`ToMe`.
    """

    k: int = 2
    layers: tuple[int, ...] = (0,)
    keep: int | float | None = None
    tail: str = "merge"
    prop_attn: bool = True

    def __post_init__(self) -> None:
        check_count(self.k, "k", 1)
        check_keep(self.keep)
        if self.tail not in ("merge", "drop"):
            raise ValueError(f"tail is 'merge' or 'drop', not {self.tail!r}")

    def acts(self, layer: int, depth: int) -> bool:
        return layer in self.layers

    def plan(self, evidence: Evidence) -> Plan:
        n, p = evidence.n, evidence.prefix
        free = n - p
        groups = count(self.keep, free) if self.keep is not None else free // min(self.k, max(1, free))
        if groups == free:
            return Identity.like(evidence.x)
        position = torch.arange(n, device=evidence.x.device)
        end = free if self.keep is not None or self.tail == "merge" else groups * self.k
        step = torch.arange(1, groups + 1, device=position.device)
        target = p + (step * free // groups if self.keep is not None else step * self.k) - 1
        chosen = torch.zeros(n, dtype=torch.bool, device=position.device).scatter(0, target, True)
        # The number of sources is known, so this stays one graph where a boolean index would not.
        source = chosen[p : p + end].long().argsort(stable=True)[: end - groups] + p
        m = unit(key_metric(evidence))
        scores = finite(m[:, source] @ m[:, target].transpose(1, 2), evidence)
        keep = torch.cat([position[:p], target]).expand(evidence.batch, -1)
        return Merge(n, keep, source.expand(evidence.batch, -1), p + scores.argmax(-1))
