"""Token Fusion, ToFu (arXiv 2312.01026): prune in the early layers, merge with restored norms in the late ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenreduce.algorithms.matching import bipartite, clamp_r
from tokenreduce.algorithms.scoring import key_metric
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Merge, Plan, Prune
from tokenreduce.core.reducer import check_size_bias
from tokenreduce.core.schedule import Scheduled

__all__ = ["ToFu"]

MODES = ("prune", "mlerp", "mean")


@dataclass(frozen=True)
class ToFu(Scheduled, name="tofu", needs=("keys",), paper="2312.01026", title="Token Fusion"):
    """ToFu: ToMe's matching; early layers drop the matched tokens, late ones merge them by MLERP.

    MLERP gives a group the direction of its members' mean and the norm of its largest member; where the mean is the
    zero vector it stays zero.

    Args:
        r, inflect, keep: see :class:`~tokenreduce.core.schedule.Scheduled`. ``r`` above half of the free tokens is
            clamped and reported.
        switch: first 0-based layer of the late kind; depth // 2 + 1 by default (of 12 layers, 0-6 prune and 7-11
            merge), the published third-party rule: the paper's own switching depth is not known to us.
        mode: what early and late layers do, a pair of "prune", "mlerp" and "mean", or one of them for all layers.
        keep_mass: whether a pruned token's size is added to the token it was matched with. Off by default: the mass
            leaves with the token, as in every pruning method.
        prop_attn: proportional attention. Off by default, as sizes have no effect in the published third-party code.
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1]; None leaves it to ``prop_attn``.

    Decision: means are equally weighted, not by size (the paper's choice is not known to us).

    Raises ``ValueError`` for a negative ``r``, a bad ``keep``, ``switch`` or ``mode``, or a list longer than the model.
    """

    switch: int | None = None
    mode: str | tuple[str, str] = ("prune", "mlerp")
    keep_mass: bool = False
    prop_attn: bool = False
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size_bias(self.size_bias)
        if self.switch is not None:
            check_count(self.switch, "switch")
        mode = (self.mode, self.mode) if isinstance(self.mode, str) else tuple(self.mode)
        if len(mode) != 2 or any(m not in MODES for m in mode):
            raise ValueError(f"mode is one of {', '.join(MODES)} or a pair (early, late) of them, not {self.mode!r}")
        object.__setattr__(self, "mode", mode)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        switch = evidence.depth // 2 + 1 if self.switch is None else self.switch
        mode = self.mode[evidence.layer >= switch]
        real = None if evidence.valid is None else evidence.valid.float()
        r = clamp_r(self.amount(evidence), evidence, self.name)
        norm = "max" if mode == "mlerp" else "none"
        plan = bipartite(key_metric(evidence), r, evidence, weights=real, by_size=False, norm=norm)
        if mode != "prune" or not isinstance(plan, Merge):
            return plan
        if not self.keep_mass:
            return Prune(plan.n, plan.keep)
        ones = torch.ones(evidence.batch, evidence.n, device=evidence.x.device)
        return replace(plan, weights=ones.scatter(1, plan.src, 0.0))
