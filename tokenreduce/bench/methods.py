"""Which methods stand in a table, as text: names, wildcards, settings, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from tokenreduce.bench.task import Task
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer, build
from tokenreduce.core.registry import get_class, list_methods
from tokenreduce.core.specs import format_spec, parse_spec

__all__ = [
    "BASELINES", "TOLERANCE", "UNREDUCED", "baselines_of", "check_budgets", "check_methods", "full_name", "is_baseline",
    "solvable", "spec_of", "split_methods", "stages_of",
]  # fmt: skip

UNREDUCED = "unreduced"
BASELINES = ("random", "uniform", "resize")
#: A row may miss its budget by this share of what the unreduced model spends before its notes say so.
TOLERANCE = 0.03


def is_baseline(method: str) -> bool:
    """Whether a row's method is a baseline, at whatever stage: ``random`` and ``random@projector``."""
    return method.partition("@")[0] in (*BASELINES, "pool", "pool-frames", "uniform-frames")


def solvable(spec: str) -> bool:
    """Whether a method has a ``keep`` that is not given in its spec."""
    name, settings = parse_spec(spec)
    return "keep" in {f.name for f in fields(get_class(name))} and "keep" not in settings


def split_methods(text: str) -> list[str]:
    """``"tome,pitome"`` to its parts; a part may carry settings: ``"tome:prop_attn=false,inflect=0.5,pitome"``.

    >>> split_methods("tome:prop_attn=false,inflect=0.5,pi*")
    ['tome:prop_attn=false,inflect=0.5', 'pi*']
    """
    out: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if out and ":" in out[-1] and "=" in part and ":" not in part:
            out[-1] += "," + part
        else:
            out.append(part)
    return out


def check_budgets(budgets: Sequence[float], what: str = "FLOPs") -> tuple[float, ...]:
    """Sorted from mild to strong. Raises ``ValueError`` for a share outside (0, 1]."""
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of the unreduced {what} in (0, 1], for example 0.5, not {budget!r}")
    return tuple(sorted({float(b) for b in budgets}, reverse=True))


def full_name(kind: type[Reducer], stages: Sequence[str]) -> str:
    """The name of a method that means it at any of ``stages``: ``random@encoder`` where another has a ``random``."""
    if "@" in kind.name or not any(list_methods(kind.name, stage=s) for s in stages if s != kind.stage):
        return kind.name
    return f"{kind.name}@{kind.stage}"


def spec_of(reducers: Sequence[Reducer], stages: Sequence[str]) -> str:
    """``reducers`` as text with full names and the budget that they run at."""
    return label_of(reducers, [full_name(type(r), stages) for r in reducers])


def check_methods(
    methods: Sequence[str],
    stages: Sequence[str],
    served: Sequence[str] | None = None,
    among: Sequence[str] | None = None,
) -> list[str]:
    """Names, wildcards and specs to specs with full names; a name that several of ``stages`` have means all of them.

    Where a text means several methods, only those of ``served`` are taken, if that is given. Names are full ``among``
    stages, ``stages`` by default.

    Raises ``ValueError`` for an unknown one or one of another stage.
    """
    out: list[str] = []
    among = among or stages
    swept = f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(stages)}"
    for text in methods:
        name, settings = parse_spec(text)
        short, _, own = name.partition("@")
        where = [s for s in stages if own in ("", s)]
        found = [full_name(get_class(n, s), among) for s in where for n in list_methods(short, stage=s)]
        if not found and any(c in name for c in "*?["):
            known = ", ".join(full_name(get_class(n, s), among) for s in stages for n in list_methods(stage=s))
            raise ValueError(f"no {' or '.join(stages)} method matches {name!r}; known: {known}")
        if not found:
            raise ValueError(f"{name} acts at stage {get_class(name).stage}, this benchmark sweeps {swept}")
        if served is not None and (len(found) > 1 or any(c in name for c in "*?[")):
            found = [f for f in found if f in served]
        for each in found:
            build(get_class(each), settings)
            out.append(format_spec(each, settings))
    return list(dict.fromkeys(out))


def baselines_of(task: Task) -> list[str]:
    """Full names of the baselines that stand in every table of ``task``."""
    given: Sequence[str] | None = getattr(task, "baselines", None)
    if given is not None:
        return list(given)
    stage = task.stages[0]
    return [get_class(b, stage).name for b in BASELINES if b in list_methods(stage=stage)]


def stages_of(task: Task) -> tuple[str, ...]:
    """Stages of all methods that may stand in a table of ``task``."""
    return tuple(dict.fromkeys((*task.stages, *(get_class(b).stage for b in baselines_of(task)))))
