"""Settings that are tried: which stages act, the method of each, and how a budget is split over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from tokenreduce.core.draft import Draft
from tokenreduce.core.reducer import Reducer

__all__ = ["SPLIT", "Draft", "combinations", "drafts_of", "fitted", "suggested"]

#: The share that a stage keeps before all are brought to the budget together.
SPLIT = (0.3, 0.95)
#: Halvings of the common exponent, whose largest value takes nearly everything.
STEPS, MOST = 11, 80.0


def fitted(draft: Draft, cost: Callable[[tuple[Reducer, ...]], float], budget: float) -> tuple[Reducer, ...]:
    """The settings of ``draft`` that keep most at a cost of no more than ``budget``; the cheapest where none does."""
    low, high = 0.0, MOST
    if cost(draft.at(high)) > budget:
        return draft.at(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if cost(draft.at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return draft.at(high)


def combinations(stages: Sequence[str]) -> list[str]:
    """Every choice of stages as text, single ones first."""
    sizes = range(1, len(stages) + 1)
    return ["+".join(some) for n in sizes for some in itertools.combinations(stages, n)]


def suggested(trial: Any, names: dict[str, list[str]]) -> Draft:
    """What an optuna ``trial`` proposes."""
    stages = trial.suggest_categorical("stages", combinations(list(names))).split("+")
    chosen = [trial.suggest_categorical(f"method_{stage}", names[stage]) for stage in stages]
    splits = [trial.suggest_float(f"split_{stage}", *SPLIT) for stage in stages]
    return Draft(tuple(chosen), tuple(splits))


def drafts_of(names: dict[str, list[str]], known: Sequence[str]) -> list[dict[str, Any]]:
    """Parameters of trials to begin with: well-known methods alone, then those of two stages together. Where there is
    one stage, all of its methods, the well-known first: they are few, and no split is to be found."""
    there = {stage: [n for n in known if n in of] or of[:2] for stage, of in names.items()}
    if len(names) == 1:
        rank = {name: i for i, name in enumerate(known)}
        there = {stage: sorted(of, key=lambda n: rank.get(n, len(rank))) for stage, of in names.items()}
    half = sum(SPLIT) / 2
    out = [
        {"stages": stage, f"method_{stage}": name, f"split_{stage}": half} for stage in names for name in there[stage]
    ]
    for a, b in itertools.combinations(names, 2):
        pair = {f"method_{a}": there[a][0], f"method_{b}": there[b][0], f"split_{a}": half, f"split_{b}": half}
        out.append({"stages": f"{a}+{b}", **pair})
    return out
