"""V2Drop (arXiv 2509.01552): drop the visual tokens that the layer before changed least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.sequence import check_stages, keep_best, stages_of
from tokenreduce.core.budget import check_keep
from tokenreduce.core.evidence import LanguageEvidence
from tokenreduce.core.plan import Identity, Plan
from tokenreduce.core.reducer import Reducer

__all__ = ["V2Drop"]

_LAYERS, _KEEP = (3 / 32, 17 / 32, 22 / 32), (0.5, 0.5, 0.0)


@dataclass(frozen=True)
class V2Drop(Reducer, name="v2drop", stage="language", needs=("before",), paper="2509.01552", title="V2Drop"):
    """V2Drop: at a few layers, the visual tokens stay that the layer before wrote most into.

    The score is the length (L2, float32) of the difference between what enters the layer and what entered the one
    before, DeepStack features included, of the same surviving tokens. No attention is needed; text enters only by what
    attention has mixed in already. Original order and positions; decoding makes no new choice.

    Args:
        layers: 0-based layers that see fewer tokens, ascending, each at least 1; by default 3, 17, 22 of 32 (LLaVA-1.5)
            and as deep in other models. The code for Qwen2-VL has 3, 16, 22 of 28 with 0.25, 0.05, 0.
        keep: with a list, the share of the tokens that reach each layer, rounded down as published; 0 leaves one (the
            paper says none). (0.5, 0.5, 0) without any. One number is the mean of the visual tokens over all layers, a
            count or a share of those at the entry, reached by equal ratios (ours; the published lists do not give the
            paper's means): what the layers before the first drop have used up already cannot be saved, and then one
            token is left behind it.

    Different from the official code: every sample decides by its own visual tokens, and state belongs to the
    generation. At least one visual token stays; ties go to the lower index.

    Raises ``ValueError`` for other values, lists of different lengths, and layers that the model does not have.
    """

    layers: tuple[int, ...] | None = None
    keep: int | float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "keep"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_stages(self.layers, "layers", 1)
        if not isinstance(self.keep, tuple):
            check_keep(self.keep)
        elif not self.keep or not all(
            isinstance(k, int | float) and not isinstance(k, bool) and 0 <= k <= 1 for k in self.keep
        ):
            raise ValueError(f"keep is a number, or a list of shares in [0, 1], one for each layer, not {self.keep!r}")
        shares = self._shares()
        layers = len(self.layers or _LAYERS)
        if shares is not None and len(shares) != layers:
            raise ValueError(f"layers has {layers} numbers and keep {len(shares)}; give one share for each layer")

    def _shares(self) -> tuple[float, ...] | None:
        """The share that stays at every layer, None where one number says the mean."""
        return _KEEP if self.keep is None else self.keep if isinstance(self.keep, tuple) else None

    def _layers(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return stages_of(self.layers, depth, "layers")
        if depth < 4:
            raise ValueError(f"three layers that drop need a language model of 4 layers, not {depth}; give layers")
        out: list[int] = []
        for share in _LAYERS:  # each behind the one before
            out.append(max(int(share * depth + 0.5), out[-1] + 1 if out else 1))
        return tuple(out)

    def acts_at(self, layer: int, depth: int) -> bool:
        shares = self._shares()
        everything = self.keep == 1.0 and isinstance(self.keep, float) if shares is None else set(shares) == {1}
        return layer in self._layers(depth) and not everything

    def plan(self, evidence: LanguageEvidence) -> Plan:
        layers = self._layers(evidence.depth)
        stage, first, shares = layers.index(evidence.layer), evidence.visual_entry(), self._shares()
        if shares is not None:
            assert evidence.visual is not None
            present = evidence.visual.sum(1, keepdim=True)
            wanted = (present.double() * shares[stage]).long().clamp(min=1)
        else:
            assert isinstance(self.keep, int | float)
            means = [self.keep / max(n, 1) if isinstance(self.keep, int) else self.keep for n in first[:, 0].tolist()]
            ratio = torch.tensor([_ratio(m, layers, evidence.depth) ** (stage + 1) for m in means]).double()
            wanted = (first * ratio.to(first.device)[:, None] + 0.5).long().clamp(min=1)
        if evidence.visual is not None and bool((wanted >= evidence.visual.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.x)
        change = (evidence.x.detach().float() - evidence.before.detach().float()).norm(dim=-1)
        return keep_best(change, wanted, evidence)


def _ratio(mean: float, layers: tuple[int, ...], depth: int) -> float:
    """What every drop leaves of the tokens that reach it, so that their mean over ``depth`` layers is the share
    ``mean`` of those at the entry; 0 where that cannot be reached."""
    spans = [b - a for a, b in zip((0, *layers), (*layers, depth), strict=True)]
    low, high = 0.0, 1.0
    if mean >= 1:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = sum(span * middle**i for i, span in enumerate(spans)) / depth
        low, high = (middle, high) if reached <= mean else (low, middle)
    return low
