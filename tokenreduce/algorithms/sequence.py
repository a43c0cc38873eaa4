"""Choosing among the visual tokens of a mixed sequence, as methods inside a language model do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite
from tokenreduce.core.budget import Keep, check_count, check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.host import best_among, on_host, values
from tokenreduce.core.plan import Identity, Mix, Plan, Prune

__all__ = [
    "best", "check_stages", "keep_best", "keep_chosen", "keep_mixed", "packed", "paid_most", "question", "rows_of",
    "shrink", "stages_of", "visual_counts", "visual_of",
]  # fmt: skip


def visual_of(evidence: LanguageEvidence) -> Tensor:
    """(B,N) bool of the visual tokens. Raises ``ValueError`` for evidence that marks none."""
    if evidence.visual is None:
        raise ValueError("the evidence marks no visual tokens: give Evidence(visual=...) with a bool mask (B,N)")
    return evidence.visual


def visual_counts(keep: Keep, evidence: LanguageEvidence) -> tuple[Tensor, Tensor]:
    """``(present, wanted)``, (B,1) each: visual tokens of every sample and how many of them stay.

    The same rule as :func:`tokenreduce.core.budget.count`, for samples with different numbers of visual tokens.
    """
    check_keep(keep)
    present = visual_of(evidence).sum(1, keepdim=True)
    if isinstance(keep, int):
        wanted = present.clamp(max=keep)
    else:
        wanted = torch.minimum((keep * present.double() + 0.5).long().clamp(min=1), present)
    return present, wanted


def keep_best(scores: Tensor, keep: Keep | Tensor, evidence: LanguageEvidence) -> Plan:
    """Keep the best visual tokens of every sample by ``scores`` (B,N) and all other tokens, in order.

    ``keep`` is a count, a ratio, or a count for every sample (B,1). Ties go to the lower index. The identity when the
    budget covers every visual token.
    """
    visual = visual_of(evidence)
    if isinstance(keep, Tensor):
        present, wanted = visual.sum(1, keepdim=True), keep
    else:
        present, wanted = visual_counts(keep, evidence)
    if bool((wanted >= present).all()):
        return Identity.like(evidence.x)
    return keep_chosen(best(finite(scores, evidence), visual, wanted), evidence)


def keep_chosen(chosen: Tensor, evidence: LanguageEvidence) -> Plan:
    """Keep the visual tokens in ``chosen`` (B,N) bool and all other tokens, in order."""
    stay = chosen | ~visual_of(evidence)
    return Identity.like(evidence.x) if bool(stay.all()) else Prune.from_mask(stay)


def keep_mixed(
    stay: Tensor, joined: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], evidence: LanguageEvidence
) -> Plan:
    """Keep the tokens in ``stay`` (B,N) bool, in order, some of them mixed with others that go.

    ``joined`` has for every sample ``(src (R,), into (R,), weight (R,), own (N,))``: token ``src`` comes with its
    weight to the kept token ``into``, which counts ``own`` itself (1 where nothing comes).
    """
    if bool(stay.all()):
        return Identity.like(evidence.x)
    samples = []
    for b, (src, into, weight, own) in enumerate(joined):
        keep = stay[b].nonzero().flatten()
        place = stay[b].long().cumsum(0) - 1
        to = torch.cat([torch.arange(len(keep), device=keep.device), place[into]])
        samples.append((keep, torch.cat([keep, src]), to, torch.cat([own[keep], weight])))
    return Mix.from_samples(stay.shape[1], samples)


def best(scores: Tensor, among: Tensor, wanted: Tensor) -> Tensor:
    """(B,N) bool: the ``wanted`` (B,1) tokens with the highest scores (B,N) ``among`` (B,N) those marked, or all of
    them where there are fewer. Ties go to the lower index."""
    if not wanted.is_floating_point() and on_host(scores, among, wanted):
        found = best_among(values(scores.float()), values(among), values(wanted))
        if found is not None:
            return torch.from_numpy(found)
    # Two stable sorts, so that an infinite score among the marked does not tie with those that are not.
    ranked = descending(scores.float())
    ranked = ranked.gather(1, (~among.gather(1, ranked)).long().argsort(dim=1, stable=True))
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, place)
    return among & (rank < wanted)


def question(visual: Tensor, valid: Tensor | None) -> Tensor:
    """(B,N) bool: the real tokens behind a sample's last visual token, which are those that see all of them.

    The chat template's suffix is part of it. None for a sample without visual tokens or with none behind them.
    """
    behind = (visual.long().cumsum(1) == visual.sum(1, keepdim=True)) & ~visual & visual.any(1, keepdim=True)
    return behind if valid is None else behind & valid


def packed(marks: Tensor) -> tuple[Tensor, Tensor]:
    """``(index, there)``: the places of True in each row of ``marks`` (B,N), ascending; at least one wide."""
    width = max(1, int(marks.sum(1).max()))
    index = (~marks).long().argsort(dim=1, stable=True)[:, :width]
    return index, marks.gather(1, index)


def rows_of(evidence: LanguageEvidence, where: Tensor) -> Tensor:
    """(B,H,R,N) attention of the tokens ``where`` (B,R). Raises ``ValueError`` for attention that was given for other
    rows than all."""
    attention = evidence.attention
    rows = attention(where)
    if attention.given is None:
        return rows
    if rows.shape[2] != evidence.n:
        raise ValueError(
            f"attention of all {evidence.n} rows is needed, not of {rows.shape[2]}: leave it out or give all"
        )
    return rows.gather(2, where[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def paid_most(evidence: LanguageEvidence, queries: Tensor) -> Tensor:
    """(B,N) attention of the tokens ``queries`` (B,N) bool, maximum over heads, summed; some rows at a time."""
    index, there = packed(queries)
    total = torch.zeros(queries.shape, device=queries.device)
    for part, real in zip(index.split(64, 1), there.split(64, 1), strict=True):
        total += rows_of(evidence, part).amax(1).masked_fill(~real.unsqueeze(-1), 0.0).sum(1)
    return total


def check_stages(layers: tuple[int, ...] | None, name: str, least: int) -> None:
    """Raise ``ValueError`` unless ``layers`` is None or a tuple of ascending layers, each at least ``least``."""
    if layers is None:
        return
    if not isinstance(layers, tuple) or not layers:
        raise ValueError(f"{name} is a tuple of 0-based layers such as (8, 16, 24), or None, not {layers!r}")
    for layer in layers:
        check_count(layer, name, least)
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(f"{name} names layers in ascending order, each once, not {layers!r}")


def stages_of(layers: Sequence[int], depth: int, name: str) -> tuple[int, ...]:
    """``layers``, or ``ValueError`` when the language model does not have them all."""
    if max(layers) >= depth:
        raise ValueError(
            f"{name}={tuple(layers)!r}: the language model has layers 0 to {depth - 1}; give {name} for its depth"
        )
    return tuple(layers)


def shrink(keep: Keep, first: Tensor, step: int, steps: int) -> Tensor:
    """(B,1) tokens that stay after ``step`` (0-based) of ``steps`` when ``first`` (B,1) shrink to ``keep`` by equal
    ratios: :func:`tokenreduce.core.budget.geometric` for samples with different numbers of tokens."""
    check_keep(keep)
    total = first.double()
    last = first.clamp(max=keep) if isinstance(keep, int) else (keep * total + 0.5).long().clamp(min=1).minimum(first)
    if step == steps - 1:
        return last
    share = (last / total.clamp(min=1)) ** ((step + 1) / steps)
    return last.maximum((share * total + 0.5).long().minimum(first))
