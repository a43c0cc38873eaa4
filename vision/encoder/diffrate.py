"""DiffRate (arXiv 2305.17997): prune, then merge, at learned rates per layer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenreduce.algorithms.scoring import finite, importance, inner, select, unit
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, Prune, take
from tokenreduce.core.reducer import Reducer, check_size_bias

__all__ = ["SCHEDULES", "DiffRate"]

#: The published schedule whose shape ``keep`` follows.
CURVE = "vit-s-deit@2.9"
EVERYTHING = 10**9
Lists = tuple[tuple[int, ...], tuple[int, ...], int]


def _read() -> dict[str, Lists]:
    models = json.loads(Path(__file__).with_name("diffrate_schedules.json").read_text(encoding="utf-8"))
    out = {}
    for model, targets in models.items():
        tokens = targets.pop("tokens")
        for target, (prune, merge) in targets.items():
            out[f"{model}@{target}"] = (tuple(prune), tuple(merge), tokens)
    return out


#: The published schedules: "model@GMACs" to (kept after pruning, kept after merging, tokens at the entry). All counts
#: include the class token. The hierarchical CAFormer is left out: it un-merges tokens between its stages.
SCHEDULES = _read()


def _clamped(prune: Sequence[int], merge: Sequence[int], patches: int) -> tuple[tuple[int, int], ...]:
    """The counts as they take effect: a count above what is left does nothing."""
    out, left = [], patches
    for p, m in zip(prune, merge, strict=True):
        middle = min(left, p)
        left = min(middle, m)
        out.append((middle, left))
    return tuple(out)


def _ratios(schedule: str) -> tuple[float, ...]:
    """Kept ratios: 1, then after pruning and after merging of every layer."""
    prune, merge, tokens = SCHEDULES[schedule]
    steps = _clamped([p - 1 for p in prune], [m - 1 for m in merge], tokens - 1)
    return (1.0, *(left / (tokens - 1) for pair in steps for left in pair))


RATIOS = _ratios(CURVE)
#: The same as text: a compiled graph may take floats of a module for inputs.
_CURVE = tuple(map(repr, RATIOS))


def _published(schedule: str) -> Lists:
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; published are {', '.join(SCHEDULES)} (model@GMACs)")
    return SCHEDULES[schedule]


@dataclass(frozen=True)
class DiffRate(Reducer, name="diffrate", stage="encoder", needs=("attention",), paper="2305.17997", title="DiffRate"):
    """DiffRate: in every layer the least important patches are pruned and the next ones merged, at given counts.

    Patches are ranked by the class token's attention (mean over heads). The best ``prune_kept_num[l]`` stay, and of
    these the ones behind rank ``merge_kept_num[l]`` join the kept patch whose features are most similar (cosine of the
    residual stream). The value is the plain mean, whatever the sizes; a source's size counts times its similarity.

    Args:
        schedule: a published schedule, for instance "vit-b-mae@11.5" (``SCHEDULES`` of this module lists them);
            "vit-s-deit@2.9" when nothing else is given.
        prune_kept_num, merge_kept_num: tokens left after pruning and after merging, one number per layer, the class
            token included. A number above what is left does nothing. One of the two may be left out.
        tokens: tokens at the entry (one class token included) that the two lists are meant for; another number of
            patches scales them. None: they are taken as they are.
        keep: patches left after the last layer, a count or a ratio, for any depth. An extension of this library, not
            of the paper: the curve of kept ratios of vit-s-deit@2.9 over relative depth, raised to the power that
            makes its end equal to ``keep``; block 0 is left alone as in the paper. That curve falls steeply in the
            last layer, where the class token has read what it needs, so at equal ``keep`` more tokens are processed
            than with other methods. :func:`tokenreduce.bench.rate_search.search_rates` finds rates for a model and
            a cost.
        prop_attn: attention logits get log(size), as in the paper.
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1]; None leaves it to ``prop_attn``.

    Points of this implementation. An entry c stands for c - 1 patches: registers are added to it, and a model without
    class token has one token less; there importance is the mean attention that a patch receives. Protected tokens
    neither move nor absorb. Negative similarities count as 0 in sizes, so that these stay positive (the official
    inference code takes their logarithm and yields NaN). The output order is by descending importance; in a layer
    where everything stays the official code still sorts, here the tokens stay untouched, since attention has no order.

    Raises ``ValueError`` for an unknown schedule, bad or contradicting settings, or a list whose length is not the
    number of layers.
    """

    schedule: str | None = None
    prune_kept_num: tuple[int, ...] | None = None
    merge_kept_num: tuple[int, ...] | None = None
    tokens: int | None = None
    keep: int | float | None = None
    prop_attn: bool = True
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_size_bias(self.size_bias)
        check_keep(self.keep)
        listed = False
        for name in ("prune_kept_num", "merge_kept_num"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, tuple | list) or not values:
                raise ValueError(f"{name} is a list with one number per layer, not {values!r}")
            for value in values:
                check_count(value, name, 2)  # the class token and one patch
            object.__setattr__(self, name, tuple(values))
            listed = True
        if sum((self.schedule is not None, listed, self.keep is not None)) > 1:
            raise ValueError("give one of schedule, keep, and the lists prune_kept_num and merge_kept_num")
        if self.schedule is not None:
            _published(self.schedule)
        if self.tokens is not None:
            check_count(self.tokens, "tokens", 2)
            if not listed:
                raise ValueError(
                    "tokens says what prune_kept_num and merge_kept_num are meant for; give them or leave it"
                )
        prune, merge = self.prune_kept_num, self.merge_kept_num
        if prune is not None and merge is not None and len(prune) != len(merge):
            raise ValueError(
                f"prune_kept_num lists {len(prune)} layers and merge_kept_num {len(merge)}; give one each per layer"
            )

    def _lists(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
        """Counts after pruning, after merging, and the tokens they are meant for; ``ValueError`` for another depth."""
        prune, merge, tokens = self.prune_kept_num, self.merge_kept_num, self.tokens
        if prune is None and merge is None:
            name = self.schedule or CURVE
            prune, merge, tokens = _published(name)
            fitting = ", ".join(n for n, (p, _, _) in SCHEDULES.items() if len(p) == depth) or "none"
            what, fix = f"schedule {name}", f"schedules for {depth} layers: {fitting}; keep=0.5 fits every depth"
        else:
            what, fix = "prune_kept_num and merge_kept_num", "give one number per layer"
        known = len(prune or merge or ())
        if known != depth:
            raise ValueError(f"{what}: {known} layers, but the model has {depth}; {fix}")
        return tuple(prune or (EVERYTHING,) * depth), tuple(merge or (EVERYTHING,) * depth), tokens

    def counts(self, patches: int, depth: int) -> tuple[tuple[int, int], ...]:
        """Patch tokens left (after pruning, after merging) in each of ``depth`` layers, of ``patches`` at the entry.

        >>> DiffRate(schedule="vit-s-deit@2.9").counts(196, 12)[:3]
        ((196, 196), (195, 193), (189, 175))
        """
        if patches < 2:
            return ((patches, patches),) * depth
        if self.keep is None:
            prune, merge, tokens = self._lists(depth)
            share = 1.0 if tokens is None else patches / (tokens - 1)

            def scaled(counts: tuple[int, ...]) -> list[int]:
                return [max(1, int((c - 1) * share + 0.5)) for c in counts]

            return _clamped(scaled(prune), scaled(merge), patches)
        last = count(self.keep, patches)
        curve = tuple(float(ratio) for ratio in _CURVE)
        gamma = math.log(last / patches) / math.log(curve[-1])

        def left(part: float) -> int:
            at = part * (len(curve) - 1)
            low = min(int(at), len(curve) - 2)
            logarithm = math.log(curve[low]) * (low + 1 - at) + math.log(curve[low + 1]) * (at - low)
            return max(last, count(math.exp(min(0.0, gamma * logarithm)), patches))

        steps = [(left((i + 0.5) / depth), left((i + 1) / depth)) for i in range(depth)]
        if depth > 1:
            steps[0] = (patches, patches)
        return tuple(steps)

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.keep is not None:
            return (layer > 0 or depth == 1) and not (isinstance(self.keep, float) and self.keep == 1)
        tokens = self._lists(depth)[2]
        # Where the lists belong to no number of tokens, layer 0 may or may not do something: the plan will tell.
        patches = EVERYTHING if tokens is None else tokens - 1
        left = [patches, *(merged for _, merged in self.counts(patches, depth))]
        return left[layer + 1] < left[layer]

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free, fixed = evidence.free(), evidence.n - evidence.free()
        after_prune, after_merge = self.counts(evidence.entry - fixed, evidence.depth)[evidence.layer]
        after_prune = min(after_prune, free)
        after_merge = min(after_merge, after_prune)
        if after_merge == free:
            return Identity.like(evidence.x)
        order = select(importance(evidence), after_prune, evidence, by_score=True)
        keep, source = order[:, : fixed + after_merge], order[:, fixed + after_merge :]
        if after_merge == after_prune:
            return Prune(evidence.n, keep)
        metric = unit(evidence.x.detach())
        similarity = finite(inner(take(metric, source), take(metric, keep)), evidence)
        there = evidence.valid
        if there is None and not evidence.masked:  # the prefix leads and does not absorb
            best, target = similarity[:, :, fixed:].max(-1)
            scale = best.clamp(min=0.0)
            return Merge(evidence.n, keep, source, target + fixed, size_scale=scale, by_size=False)
        barred = evidence.fixed()
        if there is not None:
            barred = ~there if barred is None else barred | ~there
        if barred is not None:
            similarity = similarity.masked_fill(barred.gather(1, keep)[:, None], float("-inf"))
        best, target = similarity.max(-1)
        weights = None if there is None else there.float()
        scale = best.clamp(min=0.0)
        if weights is not None:  # a slot that is not there has a size of 0 already, and no say in the mean
            scale = scale * weights.gather(1, source)
        return Merge(evidence.n, keep, source, target, weights=weights, size_scale=scale, by_size=False)
