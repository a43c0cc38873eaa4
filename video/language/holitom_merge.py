"""HoliTom inside the language model (arXiv 2505.21334): tokens that are little attended to join those they resemble."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.scoring import finite, inner, unit
from tokenreduce.algorithms.sequence import best, keep_mixed, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["HoliTomMerge"]


@dataclass(frozen=True)
class HoliTomMerge(
    Reducer, name="holitom-merge", stage="language", needs=("attention",), paper="2505.21334", title="HoliTom, merging"
):
    """HoliTom's inner merge: before one layer, half of the visual tokens join the others.

    Those that stay are the visual tokens with the highest attention of the last prompt token in the layer before, mean
    over heads; they keep their order and positions. Every other token goes to the kept one with the most similar hidden
    state (cosine, before anything is mixed). In the published code they join one after the other in the order of the
    prompt, each as (kept + token) / 2, so that of m of them the last weighs 1/2 and the kept token 1/2^m.

    Its counterpart before the language model is ``holitom``: ``"holitom:keep=0.1+holitom-merge:layer=18"``.

    Args:
        layer: 0-based first layer that sees fewer tokens (``HOLITOM_k``); by default 18 of 28 and as deep in other
            models, as in the paper (the code's own default is 3).
        keep: visual tokens that stay, a count or a ratio, rounded half up (the code rounds half to even); 1 -
            ``HOLITOM_r``.
        mean: "halving" as published, or "plain" for the plain mean of the kept token and all that join it.

    Raises ``ValueError`` for other values, ``layer`` below 1 or one that the model does not have.
    """

    layer: int | None = None
    keep: int | float = 0.5
    mean: str = "halving"

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_count(self.layer, "layer", 1)
        check_keep(self.keep)
        if self.mean not in ("halving", "plain"):
            raise ValueError(f"mean is 'halving' or 'plain', not {self.mean!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        wanted = max(int(18 / 28 * depth + 0.5), 1) if self.layer is None else self.layer
        if wanted >= depth:
            raise ValueError(f"layer={wanted}: the language model has layers 0 to {depth - 1}")
        return layer == wanted

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        present, wanted = visual_counts(self.keep, evidence)
        if bool((wanted >= present).all()):
            return Identity.like(evidence.x)
        scores = finite(evidence.attention(evidence.last())[:, :, 0].mean(1), evidence)
        stay = best(scores, visual, wanted)
        joined = []
        for b in range(evidence.batch):
            left, gone = stay[b].nonzero().flatten(), (visual[b] & ~stay[b]).nonzero().flatten()
            own = torch.ones(evidence.n, device=scores.device)
            if not len(gone) or not len(left):
                joined.append((gone[:0], gone[:0], own[:0], own))
                continue
            x = unit(evidence.x[b].detach())
            into = left[inner(x[gone][None], x[left][None])[0].argmax(1)]
            number = torch.bincount(into, minlength=evidence.n)
            if self.mean == "plain":
                own = 1 / (1 + number.float())
                weight = own[into]
            else:
                order = into.argsort(stable=True)  # members of one kept token side by side, in the prompt's order
                start = (number.cumsum(0) - number)[into[order]]
                place = torch.arange(len(gone), device=into.device) - start
                weight = torch.zeros(len(gone), device=scores.device)
                weight[order] = torch.exp2((place - number[into[order]]).float())
                own = torch.exp2(-number.float())
            joined.append((gone, into, weight, own))
        return keep_mixed(stay | ~visual, joined, evidence)
