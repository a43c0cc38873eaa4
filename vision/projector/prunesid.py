"""PruneSID (arXiv 2603.09480): groups of tokens by principal components, and in each the important that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Salient, by_class, kept
from tokenreduce.algorithms.scoring import clean, descending, gram, unit
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["PruneSID"]

#: Tokens from which the code for Qwen puts them in the image's order.
_SORTED_ABOVE = 150


@dataclass(frozen=True)
class PruneSID(Salient, name="prunesid", needs=("tower",), paper="2603.09480", title="PruneSID"):
    """PruneSID: every token belongs to the principal component that it weighs most in; groups give their important
    tokens, those more than others that hold much that is different.

    Of sigmoid features, less their mean over the channels (in every token), the ``keep / 4`` first components are
    taken; a token's group is the one with its largest absolute entry. In every group the most important token is
    picked, tokens more similar to it than a threshold (cosine) are put behind, and so on; the quota of a group follows
    from its number of picks, and fills with picks first, then with the others by importance.

    The code has two forms, which differ from the paper (centring over tokens, entries as importance, proportional
    quotas). With a class token (LLaVA, on features before the projector): importance is its attention, the threshold
    keep / 32 times the mean cosine, and the class token is kept as the first output and counts as one. Without (Qwen):
    importance is the absolute entry, the threshold is max(keep / (N / 18), 1) times the mean over all N x N of the
    cosines with j >= i only (about half as much), at least 4 components. Order as published: group after group, within
    a group by rank; the form without class token is in the image's order above 150 tokens.

    Different from the official code: components are exact (there a randomised decomposition; same groups), so that the
    plan is a function of the image; exactly ``keep`` tokens stay (there a form without class token keeps at least 16);
    no more components than tokens or channels; ties go to the lower index. The paper's budget by image (Dyn) is
    another method.

    Args:
        keep: outputs of an image in all, the class token included; 64 in the paper.
        score: "cls" or "auto" (with a class token) is the first form, "component" the second; "auto" without one too.
        order: "group" as published, or "raster". Where positions are original, places are the image's anyway.
        layer: block of the tower whose class token's attention ranks.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    space: ClassVar[str] = "vision"
    scores: ClassVar[tuple[str, ...]] = ("auto", "cls", "component")

    keep: int | float = 64
    order: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("group", "raster"):
            raise ValueError(f"order is 'group' or 'raster', not {self.order!r}")

    def with_class(self) -> bool:
        return self.score != "component"

    def required(self) -> tuple[str, ...]:
        return ("tower", "cls") if self.score == "cls" else () if self.score == "component" else ("tower",)

    def tower_blocks(self) -> tuple[float | int | None, ...]:
        return () if self.score == "component" else (self.layer,)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x = clean(evidence.x[:, evidence.prefix :].detach().float(), evidence)
        attended = self.score != "component" and by_class(evidence.tower(self.layer), self.score)
        own = int(attended and evidence.prefix > 0 and evidence.cls)
        least = 1 if attended else 4
        weights = components(x, max(keep // 4, least))
        best, group = weights.max(2)
        importance = self.saliency(evidence) if attended else best
        alike = gram(unit(x))
        n, pairs = x.shape[1], alike.triu(1).sum((1, 2))
        if attended:
            limit = keep / 32 * pairs / max(n * (n - 1) / 2, 1)
        else:
            limit = max(keep / (n / 18), 1) * (pairs + alike.diagonal(dim1=1, dim2=2).sum(1)) / n**2
        sets = weights.shape[2]
        samples = zip(importance, group, alike, limit.tolist(), strict=True)
        chosen = torch.stack([self._sample(*one, sets, keep, own) for one in samples])
        return kept(chosen, evidence, raster=self.order == "raster" or (not attended and keep > _SORTED_ABOVE))

    def _sample(
        self, importance: Tensor, group: Tensor, alike: Tensor, limit: float, sets: int, keep: int, own: int
    ) -> Tensor:
        """(keep - own,) tokens of one image, group by group."""
        ranked, picks = suppress(importance, group, alike, limit)
        by_group: list[list[int]] = [[] for _ in range(sets)]
        labels = group.tolist()
        for i in ranked:
            by_group[labels[i]].append(i)
        numbers = [sum(picks[i] for i in one) for one in by_group]
        quota = quotas([len(one) for one in by_group], numbers, keep, own)
        chosen = [i for one, k in zip(by_group, quota, strict=True) for i in one[:k]]
        return torch.tensor(chosen, dtype=torch.long, device=group.device)


def components(x: Tensor, count: int) -> Tensor:
    """(B,N,q) absolute entries of the tokens ``x`` (B,N,C) in the first q components of their sigmoids; q is ``count``,
    at most N and C."""
    a = x.sigmoid()
    a = (a - a.mean(2, keepdim=True)).double()
    n, c = a.shape[1:]
    count = min(count, n, c)
    if n <= c:  # the eigenvectors of the smaller product, ascending
        return torch.linalg.eigh(a @ a.transpose(1, 2))[1].flip(2)[..., :count].abs().float()
    values, vectors = torch.linalg.eigh(a.transpose(1, 2) @ a)
    out = a @ vectors.flip(2)[..., :count] / values.flip(1)[:, None, :count].clamp(min=1e-24).sqrt()
    return out.abs().float()


def suppress(importance: Tensor, group: Tensor, alike: Tensor, limit: float) -> tuple[list[int], list[bool]]:
    """``(order, picked)`` of N tokens: picks of all groups as they are made, then the others by importance, and which
    were picked. A pick puts the tokens of its group behind that are more ``alike`` (N,N) to it than ``limit``."""
    order = descending(importance[None])[0]
    near = ((alike > limit) & (group[:, None] == group)).cpu().numpy()
    out, behind = near[:, 0] & False, near[:, 0] & False
    first, last = [], []
    for i in order.tolist():
        if behind[i]:
            last.append(i)
            continue
        out[i] = True
        first.append(i)
        behind |= near[i]
    return first + last, out.tolist()


def quotas(members: list[int], picks: list[int], keep: int, own: int) -> list[int]:
    """How many tokens every group of ``members`` with as many ``picks`` gives, ``keep - own`` in all."""
    low = [min(1, n) for n in members]
    most = [min(5 * -(-keep // 64), n, p) for n, p in zip(members, picks, strict=True)]
    while sum(most) < min(keep, sum(members)):
        most = [min(m + 1, n) for m, n in zip(most, members, strict=True)]
    wanted = keep - own
    rest, total, taken, before, out = max(0, wanted - sum(low)), sum(picks), 0, 0, []
    for i, p in enumerate(picks):
        taken += p
        here = round(rest * taken / total)
        out.append(min(here - before + low[i], most[i]))
        before = here
    left = wanted - sum(out)
    for i in sorted(range(len(picks)), key=lambda i: -picks[i]):
        more = max(min(most[i] - out[i], left), 0)
        out[i], left = out[i] + more, left - more
    for i in reversed(range(len(out))):  # more groups than tokens wanted
        less = min(out[i], max(-left, 0))
        out[i], left = out[i] - less, left + less
    return out
