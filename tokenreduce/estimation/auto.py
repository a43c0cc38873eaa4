"""Chooses what ``auto:`` stands for: the best known methods for a model, at the budget that reaches the target there.

Which methods is known from the embedded models (:mod:`tokenreduce.estimation.known`); at which budget they reach the
target is estimated for the model at hand, from its own shapes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from tokenreduce.adapters import Description
from tokenreduce.core.auto import KINDS, Auto, Chosen
from tokenreduce.core.draft import Draft
from tokenreduce.core.reducer import Reducer
from tokenreduce.estimation.known import Candidate, Group, groups
from tokenreduce.estimation.limits import FIRST, first_token, seconds_by
from tokenreduce.estimation.live import subject_of_model
from tokenreduce.estimation.lookup import device_named
from tokenreduce.estimation.memory import cache_bytes
from tokenreduce.estimation.record import Recorded, recorded
from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.patching import describe, patched

__all__ = ["chosen", "chosen_on", "solved"]

#: A target may be missed by this share of the unreduced model's cost, and a budget is not searched finer than that.
TOLERANCE, FINE, STEPS = 0.01, 0.01, 6
#: Where a setting loses no more than this, others are not looked at.
ENOUGH = 0.01
#: Of the same stages, so many candidates are brought to the target of a language model; and how far from it one before
#: the language model may be for others there, which leave as many tokens, to be tried.
EACH, FAR = 2, 0.05
Cost = Callable[[tuple[Reducer, ...]], float]
#: What a method that does not fit a model may raise, in a patch or in a forward.
UNFIT = (ValueError, TypeError, RuntimeError, IndexError)


def chosen(model: nn.Module, wanted: Auto) -> Chosen:
    """For a model that is there. Raises ``ValueError``, see :func:`tokenreduce.core.auto.chosen_for`."""
    found = describe(model)
    name = type(model).__name__
    if wanted.kind == "tokens":
        return _at_the_entry(model, found, wanted)
    _check(found, wanted)
    try:
        subject = subject_of_model(model, Ask())
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(_unknown(wanted, name, str(error), found)) from error
    return chosen_on(subject, wanted)


def chosen_on(subject: Subject, wanted: Auto) -> Chosen:
    """For a model by its shapes, with the image and the prompt that it is asked with."""
    found = describe(subject.narrow)
    if wanted.kind == "tokens":
        return _at_the_entry(subject.narrow, found, wanted)
    _check(found, wanted)
    group = groups()["cache" if wanted.kind == "kv" else "language" if subject.answers else "image"]
    fitting = _fitting(group, found, wanted)
    if not fitting:
        raise ValueError(_unknown(wanted, subject.title, "no method in the table of known ones fits it", found))
    return _Search(subject, wanted, group).best(fitting)


def _check(found: Description, wanted: Auto) -> None:
    """Raises ``ValueError`` for what the model has not, before anything is computed."""
    if wanted.kind == "kv" and "cache" not in found.stages:
        raise ValueError(f"{wanted.text}: {found.model} has no cache of keys and values; give flops= or ttft=")
    if wanted.kind == "ttft":
        device_named(wanted.on, "fp32" if wanted.on == "measured" else "bf16")
    _stages(found, wanted)


class _Found(NamedTuple):
    candidate: Candidate
    reducers: tuple[Reducer, ...]
    share: float
    score: float
    said: str


@dataclass
class _Search:
    subject: Subject
    wanted: Auto
    group: Group

    def best(self, fitting: Sequence[Candidate]) -> Chosen:
        cost = _cost(self.subject, self.wanted)
        best: _Found | None = None
        near: tuple[float, Draft] | None = None
        tried: dict[tuple[str, ...], int] = defaultdict(int)
        failed: list[tuple[Candidate, float]] = []
        refused = []
        for one in fitting:
            if (self.subject.answers and tried[one.stages] >= EACH) or self._hopeless(one, failed):
                continue
            try:
                exponent, share = solved(one.draft, cost, self.wanted.share)
            except UNFIT as error:
                refused.append(f"{_title(one.methods)}: {str(error).splitlines()[0]}")
                continue
            if exponent is None:
                failed.append((one, share))
                near = min(near or (2.0, one.draft), (share, one.draft), key=lambda pair: pair[0])
                continue
            tried[one.stages] += 1
            made = found_at(self.group, one, exponent, share)
            if best is None or made.score > best.score:
                best = made
            if best.score >= self.group.unreduced - ENOUGH:
                break
        if best is None:
            raise ValueError(self._unreached(near, refused))
        return Chosen(self.wanted.text, best.reducers, best.share, self._reason(best))

    def _hopeless(self, one: Candidate, failed: Sequence[tuple[Candidate, float]]) -> bool:
        """Whether a candidate that is known down to fewer tokens of the same place was far from the target."""
        return any(
            one.stages == other.stages == ("projector",)
            and one.points[-1].keep >= other.points[-1].keep
            and share > self.wanted.share + FAR
            for other, share in failed
        )

    def _reason(self, best: _Found) -> str:
        asked = self.subject.shown + (f" and {self.subject.text} text tokens" if self.subject.answers else "")
        on = f" on {self.wanted.on}" if self.wanted.kind == "ttft" else ""
        return (
            f"{_best_by(best, self.group)}; here {100 * best.share:.1f} % of the {KINDS[self.wanted.kind]}{on}, "
            f"estimated for {asked}"
        )

    def _unreached(self, near: tuple[float, Draft] | None, refused: Sequence[str]) -> str:
        if near is None:
            return f"{self.wanted.text}: no known method runs on {self.subject.title}: {'; '.join(refused[:3])}"
        share, draft = near
        kept = "+".join(f"{name}:keep={keep:g}" for name, keep in zip(draft.names, draft.splits, strict=True))
        return (
            f"{self.wanted.text}: no known setting reaches it on {self.subject.title}; the nearest is {kept} at "
            f"{share:.2f}, and below that nothing was measured. The rest is spent where these stages do not act (a "
            f"tower in front of them, text, layers before the first that acts); give a target of {share:.2f} or more, "
            "or the methods themselves"
        )


def found_at(group: Group, one: Candidate, exponent: float, share: float) -> _Found:
    """A candidate at ``exponent`` of its draft, with its score and what is said of that."""
    score, point = one.score(exponent, group.unreduced)
    keeps = ", ".join(f"{k:g}" for k in point.keep)
    said = f"{100 * point.score:.1f} ±{100 * point.stderr:.1f} % at keep={keeps} ({one.source})"
    return _Found(one, one.draft.at(exponent), share, score, said)


def _best_by(best: _Found, group: Group) -> str:
    stages = "+".join(best.candidate.stages)
    whole = f"unreduced {100 * group.unreduced:.1f} %"
    return f"the best known at stage {stages} by {group.what}, {best.said}, {whole}"


def solved(draft: Draft, cost: Cost, budget: float) -> tuple[float | None, float]:
    """The least exponent in [0, 1] at which ``draft`` costs no more than ``budget``, and that cost; None and the cost
    at 1 where that is too much."""
    low, high = 0.0, 1.0
    above, below = 1.0, cost(draft.at(high))
    if below > budget + TOLERANCE:
        return None, below
    if budget >= 1:
        return low, cost(draft.at(low))
    for _ in range(STEPS):
        if budget - below <= FINE:
            break
        part = min(0.9, max(0.1, (above - budget) / max(above - below, 1e-9)))
        middle = low + part * (high - low)
        got = cost(draft.at(middle))
        if got <= budget:
            high, below = middle, got
        else:
            low, above = middle, got
    return high, below


def _cost(subject: Subject, wanted: Auto) -> Cost:
    """Shares of what the unreduced model spends, counted once for each setting."""
    spend = _spent(subject, wanted)
    whole = spend(recorded(subject))
    seen: dict[tuple[Reducer, ...], float] = {}

    def cost(reducers: tuple[Reducer, ...]) -> float:
        if reducers not in seen:
            seen[reducers] = spend(recorded(subject, reducers)) / whole
        return seen[reducers]

    return cost


def _spent(subject: Subject, wanted: Auto) -> Callable[[Recorded], float]:
    if wanted.kind == "flops":
        return lambda made: sum(op.flops for op in made.ops if op.part in FIRST)
    if wanted.kind == "kv":
        return lambda made: cache_bytes(subject, made, "bf16")
    dtype = "fp32" if wanted.on == "measured" else "bf16"
    seconds = seconds_by(device_named(wanted.on, dtype), 1, dtype)
    return lambda made: first_token(made, seconds)


def _fitting(group: Group, found: Description, wanted: Auto) -> list[Candidate]:
    """Candidates whose methods the model can serve: those known at most budgets first, then by their mean score."""
    stages = _stages(found, wanted)
    served = {stage: set(found.methods(stage)) for stage in stages}

    def fits(names: Iterable[str]) -> bool:
        parts = [name.rpartition("@") for name in names]
        return all(stage in served and short in served[stage] for short, _, stage in parts)

    some = [c for c in group.candidates if fits(c.methods)]
    return sorted(some, key=lambda c: (-len(c.points), -sum(p.score for p in c.points) / len(c.points)))


def _stages(found: Description, wanted: Auto) -> tuple[str, ...]:
    there: tuple[str, ...] = found.stages
    if lost := [s for s in wanted.stages if s not in there]:
        raise ValueError(f"{wanted.text}: {found.model} has no stage {lost[0]}; it has {', '.join(there)}")
    return wanted.stages or there


def _at_the_entry(model: nn.Module, found: Description, wanted: Auto) -> Chosen:
    """``tokens=`` is a share of the visual tokens at the entry: a method before the language model keeps just that."""
    if found.language is None:
        raise ValueError(f"{wanted.text}: {found.model} has no language model that visual tokens enter; give flops=")
    group = groups()["language"]
    before = [c for c in _fitting(group, found, wanted) if c.stages == ("projector",)]
    least = min((c.points[-1].keep[0] for c in before), default=None)
    if least is None:
        raise ValueError(_unknown(wanted, found.model, "no known method before the language model fits it", found))
    if wanted.share < least * (1 - TOLERANCE):
        raise ValueError(f"{wanted.text}: nothing was measured below tokens={least:g}; give that, or a method itself")
    scored: list[_Found] = []
    for one in before:
        keep = one.points[-1].keep[0]
        if wanted.share < keep * (1 - TOLERANCE):
            continue
        exponent = min(1.0, math.log(wanted.share) / math.log(keep))
        reducers = Draft(one.methods, (wanted.share,)).at(1.0)
        try:
            with patched(model, *reducers):
                scored.append(found_at(group, one, exponent, wanted.share)._replace(reducers=reducers))
        except UNFIT:
            continue
    if not scored:
        raise ValueError(_unknown(wanted, found.model, "no known method before the language model fits it", found))
    best = max(scored, key=lambda made: made.score)
    reason = f"{_best_by(best, group)}; it keeps {100 * wanted.share:g} % of the visual tokens of every image"
    return Chosen(wanted.text, best.reducers, wanted.share, reason)


def _title(names: Iterable[str]) -> str:
    return "+".join(names)


def _unknown(wanted: Auto, name: str, why: str, found: Description) -> str:
    """Why nothing is known of a model, and what fits it."""
    stage = wanted.stages[0] if wanted.stages else found.stages[0]
    fit = found.methods(stage) if stage in found.stages else []
    what = f"what fits it at stage {stage}: {', '.join(fit)}" if fit else "tr.describe(model) lists what fits it"
    return f"{wanted.text}: nothing is known of {name}, {why}; give the methods yourself, {what}"
