"""PACT (arXiv 2504.08966): the unimportant visual tokens go, those that are left are merged in clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, gram, unit
from tokenreduce.algorithms.sequence import best, keep_mixed, visual_counts, visual_of
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer, size_power

__all__ = ["PACT"]

#: Share that is clustered, cutoff distance, and reach of the recovery over it, for LLaVA-OneVision-7B.
_KEEP, _CUTOFF, _REACH = 0.55, 0.21, 1.5


@dataclass(frozen=True)
class PACT(
    Reducer, name="pact", stage="language", needs=("ahead", "unrotated", "attention"), paper="2504.08966", title="PACT"
):
    """PACT: before one layer, importance prunes (EUTI), then clusters by distance merge (DBDPC).

    Importance needs no attention row: with q the mean query of everything up to the last visual token (per head, before
    the rotary embedding, of the layer's own projections), a token counts as the softmax over those tokens of q k, mean
    over heads and without causal mask, times the length of its hidden state. The ``keep`` best visual tokens are
    clustered by their rotated keys, all key heads together, at distance max(0, 1 - cos): walked by density (the sum of
    exp(-(d/2)^2) over the others), a token becomes a centre if it is farther than ``cutoff`` from all centres; every
    one joins the nearest centre. Of the tokens pruned before, those within ``coef_pruned`` times the cutoff of a centre
    join it, too; the others are lost. A centre becomes the plain mean of its members and keeps its place.

    How many stay follows from the image. ``keep`` alone asks for a number instead (ours): the cutoff is found by
    bisection, the largest that leaves at least as many centres, of which the densest stay.

    Args:
        layer: 0-based first layer that sees fewer tokens; 4, or the middle of a model that is not deeper than 8 layers.
        cutoff: distance within which a centre takes others in, >= 0; 0.21 for LLaVA-OneVision-7B when neither this nor
            ``keep`` is given. With it, ``keep`` is the share (or count) that is clustered, rounded down; 0.55.
        keep: without ``cutoff``, visual tokens that stay, a count or a ratio, rounded half up.
        coef_pruned: reach of the recovery, >= 0; 1.5. 0 recovers duplicates alone.
        take_mean: whether centres become means; else they stay as they are and clusters only drop.
        size_bias: how later layers, and decode, count the key of a merged token of size s: "log" as if all were there
            (log s is added to its logits, as published), "sqrt" (half of that), a power in [0, 1], or "none". Flash
            attention has no way to add it and is refused.

    Decisions: the visual tokens of all images of a prompt are clustered jointly, as published; sums are float32; ties
    go to the lower index; at least one token is clustered.

    Raises ``ValueError`` for other values, a layer that the model does not have, and with ``size_bias`` for attention
    that takes no bias, and beside methods that choose again in decode.
    """

    layer: int | None = None
    cutoff: float | None = None
    keep: int | float | None = None
    coef_pruned: float = _REACH
    take_mean: bool = True
    size_bias: str | float = "log"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer is not None:
            check_count(self.layer, "layer")
        size_power(self.size_bias)
        for name in ("cutoff", "coef_pruned"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is a finite number >= 0, not {value!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        wanted = (4 if depth > 8 else depth // 2) if self.layer is None else self.layer
        if wanted >= depth:
            raise ValueError(f"layer={wanted}: the language model has layers 0 to {depth - 1}")
        return layer == wanted

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        present = visual.sum(1, keepdim=True)
        exact = self.cutoff is None and self.keep is not None
        wanted = present
        if exact:
            assert self.keep is not None
            wanted = visual_counts(self.keep, evidence)[1]
            if bool((wanted >= present).all()):
                return Identity.like(evidence.x)
        share = _KEEP if exact or self.keep is None else self.keep
        if isinstance(share, int):
            clustered = present.clamp(max=share)
        else:
            clustered = (present.double() * share).long().clamp(min=1).minimum(present)
        kept = best(self.importance(evidence), visual, clustered.maximum(wanted) if exact else clustered)
        keys = evidence.attention.used[1]
        keys = unit(keys.detach().float().transpose(1, 2).flatten(2))
        finite(keys.sum(-1).masked_fill(~visual, 0.0), evidence)
        stay, joined = ~visual, []
        for b in range(evidence.batch):
            where, mine = visual[b].nonzero().flatten(), kept[b][visual[b]]
            centres, src, into = self._clusters(keys[b, where], mine, int(wanted[b]) if exact else None)
            stay[b, where[centres]] = True
            own = torch.ones(evidence.n, device=where.device)
            if not self.take_mean:
                src, into = src[:0], into[:0]
            src, into = where[src], where[into]
            number = torch.bincount(into, minlength=evidence.n)
            own = 1 / (1 + number.float())
            joined.append((src, into, own[into], own))
        return keep_mixed(stay, joined, evidence)

    def importance(self, evidence: LanguageEvidence) -> Tensor:
        """(B,N) of the visual tokens; others have numbers without meaning."""
        visual = visual_of(evidence)
        place = torch.arange(evidence.n, device=visual.device)
        span = place <= torch.where(visual, place, -1).amax(1, keepdim=True)
        span = span if evidence.valid is None else span & evidence.valid
        q, k = evidence.queries.detach().float(), evidence.keys.detach().float()
        inside = span[:, None, :, None]
        mean = torch.where(inside, q, 0.0).sum(2) / span.sum(1).clamp(min=1)[:, None, None]
        mean = mean.unflatten(1, (k.shape[1], -1))
        logits = torch.einsum("bkgd,bknd->bkgn", mean, k) * evidence.attention.factor
        logits = logits.masked_fill(~span[:, None, None], torch.finfo(logits.dtype).min)
        norms = evidence.x.detach().float().norm(dim=-1)
        return finite((logits.softmax(-1).mean((1, 2)) * norms).masked_fill(~visual, 0.0), evidence)

    def _clusters(self, keys: Tensor, kept: Tensor, wanted: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(centres, src, into)`` of the visual tokens of a sample, by unit ``keys`` (n,d): which stay, and which
        ``src`` join which of them; ``kept`` (n,) are clustered."""
        mine, pruned = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        if not len(mine) or wanted == len(kept):
            all_of = torch.arange(len(kept), device=kept.device)
            return all_of, all_of[:0], all_of[:0]
        d = (1 - gram(keys[mine][None])[0]).clamp(min=0).fill_diagonal_(0.0)
        order = descending((-(d / 2).square()).exp().sum(1)[None])[0]
        cutoff = _CUTOFF if self.cutoff is None else self.cutoff
        if wanted is None:
            centres = _centres(d, order, cutoff)
        else:
            cutoff, centres = _as_many(d, order, wanted)
        centres = centres.sort().values
        group = d[:, centres].argmin(1)
        group[centres] = torch.arange(len(centres), device=group.device)
        src, into = [mine], [mine[centres[group]]]
        if len(pruned):
            apart = (1 - keys[pruned] @ keys[mine[centres]].T).clamp(min=0)
            near, nearest = apart.min(1)
            back = near <= self.coef_pruned * cutoff
            src, into = [*src, pruned[back]], [*into, mine[centres[nearest[back]]]]
        sources, targets = torch.cat(src), torch.cat(into)
        return mine[centres], sources[sources != targets], targets[sources != targets]


def _centres(d: Tensor, order: Tensor, cutoff: float) -> Tensor:
    """The tokens, in ``order``, that are farther than ``cutoff`` from all before them that are centres; from distances
    ``d`` (n,n)."""
    near = (d <= cutoff).cpu().numpy()
    taken, centres = near[0] & False, []
    for i in order.tolist():
        if not taken[i]:
            centres.append(i)
            taken |= near[i]
    return torch.tensor(centres, dtype=torch.long, device=d.device)


def _as_many(d: Tensor, order: Tensor, wanted: int) -> tuple[float, Tensor]:
    """A cutoff that leaves at least ``wanted`` centres, the largest that bisection finds, and the first of these."""
    low, high, found = 0.0, 2.0, order
    for _ in range(24):
        middle = (low + high) / 2
        centres = _centres(d, order, middle)
        if len(centres) >= wanted:
            low, found = middle, centres
            if len(centres) == wanted:
                break
        else:
            high = middle
    return low, found[:wanted]
