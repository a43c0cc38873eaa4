"""Bipartite soft matching, the step that ToMe introduced and many methods reuse."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import ascending, descending, finite, inner, refuse_nan, unit
from tokenreduce.core.constants import positions
from tokenreduce.core.evidence import BaseEvidence, Evidence
from tokenreduce.core.host import counted_rows, most_alike, on_host, values
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.readable import readable

__all__ = ["above", "best_edges", "bipartite", "cap", "clamp_r", "halvings"]


def cap(evidence: BaseEvidence) -> int:
    """The most tokens that one bipartite step can remove: half of those that are not protected."""
    if not evidence.masked:
        return max(0, evidence.n - evidence.prefix) // 2
    fixed = evidence.fixed()
    assert fixed is not None
    even, odd = (~fixed[:, ::2]).sum(1), (~fixed[:, 1::2]).sum(1)
    return int(torch.where(odd > 0, even, 0).min())


def clamp_r(r: int, evidence: BaseEvidence, name: str) -> int:
    """``r`` limited to :func:`cap`; says so through :meth:`Evidence.note`."""
    most = cap(evidence)
    if r > most:
        evidence.note(
            f"{name}: r={r} clamped to {most} at layer {evidence.layer} "
            f"({evidence.n} tokens, {evidence.prefix} protected)",
            f"{name}: r={r} is more than some layers can remove and is clamped there; tr.record(model) notes where",
        )
    return min(r, most)


def bipartite(metric: Tensor, r: int, evidence: BaseEvidence, *, ascending: bool = False, **settings: object) -> Plan:
    """Merge ``r`` tokens as in ToMe (arXiv 2210.09461): even positions look for their best match among odd ones.

    ``metric`` (B,N,d) is compared by cosine in float32. Protected tokens neither move nor absorb. The output order is
    the published one: protected tokens, unmerged even positions (ascending; by descending similarity when nothing is
    protected, as the official code has it, unless ``ascending``), odd positions. ``settings`` go to
    :class:`~tokenreduce.core.plan.Merge`.
    """
    if r <= 0:
        return Identity.like(evidence.x)
    n, p = evidence.n, evidence.prefix
    m = unit(metric)
    if evidence.valid is None and not evidence.masked:
        return _behind(m, r, n, p, evidence, ascending, settings)
    scores = inner(m[:, ::2], m[:, 1::2])
    protected = fixed = evidence.fixed()
    if evidence.valid is not None:
        fixed = ~evidence.valid if fixed is None else fixed | ~evidence.valid
    if fixed is not None and (p != 1 or evidence.masked or evidence.valid is not None):
        scores = scores.masked_fill(fixed[:, None, 1::2], float("-inf"))
    best, partner = scores.max(-1)
    best = finite(best, evidence)  # a maximum keeps NaN, so the small tensor tells as much as the map
    if fixed is not None:  # rows need no masking: a token that may not move only loses its place in the ranking
        best = best.masked_fill(fixed[:, ::2], float("-inf"))
    order = descending(best)
    source, rest = order[:, :r], order[:, r:]
    if protected is not None or ascending:  # not for padding: an order must not depend on what other samples lack
        rest = rest.sort(dim=-1).values
    # Protected tokens lead: their even positions stand first in `rest`, their odd ones first among the partners.
    even, odd = (p + 1) // 2, p // 2
    batch = rest.shape[0]
    position = torch.arange(n, device=metric.device).expand(batch, n)
    keep = torch.cat([position[:, :p], 2 * rest[:, even:], position[:, 1 + 2 * odd :: 2]], 1)
    dst = partner.gather(1, source) - odd + (p + rest.shape[1] - even)
    if evidence.valid is not None and not settings.get("by_size", True):
        # Sizes of empty slots are 0 and give them no weight; a plain mean has to be told.
        settings = {**settings, "weights": evidence.valid.float()}
    return Merge(n, keep, 2 * source, dst, **settings)  # type: ignore[arg-type]


def _behind(
    m: Tensor, r: int, n: int, p: int, evidence: BaseEvidence, sorted_: bool, settings: dict[str, object]
) -> Plan:
    """The same where just the first ``p`` of ``n`` tokens are protected: those behind them, ``m`` of which are unit
    vectors, are matched with each other."""
    batch = m.shape[0]
    even, odd = p + p % 2, p + 1 - p % 2  # the first of each that may move, and absorb
    scores = inner(m[:, even::2], m[:, odd::2])
    if on_host(scores):
        return _behind_on_host(values(scores), r, n, p, evidence, sorted_, settings)
    best, partner = scores.max(-1)
    order = descending(finite(best, evidence))
    source, rest = order[:, :r], order[:, r:]
    if p or sorted_:
        rest = rest.sort(dim=-1).values
    position = positions(n, rest).expand(batch, n)
    parts = [2 * rest + even if even else 2 * rest, position[:, odd::2]]
    keep = torch.cat([position[:, :p], *parts] if p else parts, 1)
    dst = partner.gather(1, source) + (p + rest.shape[1])
    return Merge(n, keep, 2 * source + even if even else 2 * source, dst, **settings)  # type: ignore[arg-type]


def _behind_on_host(
    scores: Any, r: int, n: int, p: int, evidence: BaseEvidence, sorted_: bool, settings: dict[str, object]
) -> Plan:
    """The rest of :func:`_behind` in numpy, from the ``scores`` (B,E,O) of even positions with odd ones."""
    batch = len(scores)
    best, partners = most_alike(scores)
    refuse_nan(best, evidence)
    even, odd = p + p % 2, p + 1 - p % 2
    order = (-best).argsort(1, kind="stable")
    source, rest = order[:, :r], order[:, r:]
    if p or sorted_:
        rest.sort(1)
    last = p + rest.shape[1]
    keep = np.empty((batch, n - r), np.int64)
    keep[:, :p] = np.arange(p)
    np.multiply(rest, 2, out=keep[:, p:last])
    keep[:, p:last] += even
    keep[:, last:] = np.arange(odd, n, 2)
    dst = partners[counted_rows(batch), source] + last
    return Merge.of_arrays(n, keep, 2 * source + even, dst, **settings)


def best_edges(metric: Tensor, evidence: BaseEvidence) -> tuple[Tensor, Tensor]:
    """``(similarity, partner)`` of the even positions (B,E): cosine to the most similar odd one and its place among
    these, as :func:`bipartite` matches them; -inf for those that may not move."""
    m = unit(metric)
    scores = inner(m[:, ::2], m[:, 1::2])
    fixed = evidence.fixed()
    if evidence.valid is not None:
        fixed = ~evidence.valid if fixed is None else fixed | ~evidence.valid
    if scores.shape[2] == 0:
        none = torch.full_like(scores[:, :, :0].sum(2), float("-inf"))
        return none, torch.zeros_like(none, dtype=torch.long)
    if fixed is not None:
        scores = scores.masked_fill(fixed[:, None, 1::2], float("-inf"))
    best, partner = scores.max(-1)
    best = finite(best, evidence)
    return best if fixed is None else best.masked_fill(fixed[:, ::2], float("-inf")), partner


def above(joins: Tensor, partner: Tensor, evidence: BaseEvidence) -> Plan:
    """Merge the even positions marked in ``joins`` (B,E) into the odd ones ``partner`` (B,E), of which samples may have
    different numbers. Order: protected tokens, unmerged even positions, odd positions, slots that are not there."""
    n, b = evidence.n, evidence.batch
    numbers = joins.sum(1)
    known = readable(numbers)
    most = int(numbers.max()) if known else joins.shape[1]
    if most == 0:
        return Identity.like(evidence.x)
    position = torch.arange(n, device=joins.device).expand(b, -1)
    rank = position % 2 + 1
    fixed = evidence.fixed()
    rank = rank if fixed is None else rank.masked_fill(fixed, 0)
    gone = torch.zeros(b, n, dtype=torch.bool, device=joins.device)
    gone[:, ::2] = joins
    gone = gone if evidence.valid is None else gone | ~evidence.valid
    order = ascending(torch.where(gone, 3, rank))
    slot = order.argsort(dim=1)
    left = (~gone).sum(1)
    keep = order[:, : int(left.max())] if known else order
    valid: Tensor | None = torch.arange(keep.shape[1], device=keep.device) < left[:, None]
    source = ascending((~joins).long())[:, :most]
    real = joins.gather(1, source)
    # A sample with fewer repeats its first token, which nothing joins then.
    src = torch.where(real, 2 * source, keep[:, :1])
    dst = torch.where(real, slot.gather(1, 2 * partner.gather(1, source) + 1), 0)
    scale: Tensor | None = real.float()
    if known and bool(real.all()):
        scale = None
        valid = valid if evidence.valid is not None and not bool(evidence.valid.all()) else None
    return Merge(n, keep, src, dst, size_scale=scale, valid=valid)


def halvings(x: Tensor, keep: int, layer: int = 0) -> list[Merge]:
    """The merges, one after the other, that leave ``keep`` of the tokens ``x`` (B,N,C) by bipartite matching on the
    tokens themselves: each merges half of what is left, the last one as many as are needed.

    A target is the plain mean of itself and its sources in this step; sizes do not count, so that several steps are a
    mean of means. ``layer`` is named in errors.
    """
    x, steps = x.detach().float(), []
    while x.shape[1] > keep:
        r = min(x.shape[1] // 2, x.shape[1] - keep)
        steps.append(cast(Merge, bipartite(x, r, Evidence(x, layer=layer), by_size=False)))
        x = steps[-1].reduce(x)
    return steps
