"""The sweep: every method at every budget on one task, row by row, able to continue where it stopped.

A budget is a share of what the unreduced model spends, in FLOPs unless the task has another axis. Each method's
``keep`` is solved for it, so that the rows of one budget cost the same and differ in what they keep. Baselines such as
``random``, ``uniform`` and ``resize`` stand in every sweep.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tokenreduce.bench.methods import (
    TOLERANCE,
    UNREDUCED,
    baselines_of,
    check_budgets,
    check_methods,
    full_name,
    solvable,
    spec_of,
    stages_of,
)
from tokenreduce.bench.runs import Run, hardware, open_run, versions
from tokenreduce.bench.task import FLOPS, Task, axis_of, spent
from tokenreduce.bench.times import consistent
from tokenreduce.bench.watch import Point, Watch
from tokenreduce.common.words import counted
from tokenreduce.core.auto import auto_of, chosen_for, is_auto
from tokenreduce.core.budget import BudgetError
from tokenreduce.core.reducer import Reducer, build
from tokenreduce.core.registry import get_class, list_methods, parse
from tokenreduce.core.specs import parse_spec

__all__ = ["BUDGETS", "Point", "Solver", "Watch", "points", "sweep"]

BUDGETS = (0.75, 0.5, 0.35)


class Solver:
    """Finds the ``keep`` at which a method spends a given share of what the unreduced model does, on the task's axis.
    Evaluations are remembered."""

    LEAST, FINE, STEPS = 0.001, 0.002, 18
    TOO_SMALL = -1.0  # in place of a share: the method keeps more than this always, so the search goes up from here

    def __init__(self, task: Task) -> None:
        self.task = task
        self._base: float | None = None
        self._seen: dict[str, dict[tuple[str, float], float]] = {}

    @property
    def base(self) -> float:
        """What the unreduced model spends."""
        if self._base is None:
            self._base = spent(self.task, ())
            if self._base <= 0:
                what = axis_of(self.task).label
                raise ValueError(f"the unreduced model counts {self._base:g} {what}; shares of it have no meaning")
        return self._base

    @property
    def flops(self) -> float:
        """FLOPs of the unreduced model."""
        return self.base if axis_of(self.task) == FLOPS else float(self.task.flops(()))

    def share(self, reducers: Sequence[Reducer]) -> float:
        """What is spent with ``reducers`` as a share of what the unreduced model does."""
        return spent(self.task, reducers) / self.base

    def solve(self, spec: str, budget: float) -> tuple[Reducer, float]:
        """The reducer nearest to ``budget`` and the share that it reaches.

        Bisection with secant steps on ``keep``; methods that act in whole steps (or not monotonically) give the
        nearest point seen. Equal steps down to one token still leave half of the cost, so a method that also has the
        number ``r`` of tokens to remove per layer is solved for ``r`` where ``keep`` does not reach far enough.
        A setting too small for what the method always keeps is none of them. Raises ``ValueError`` for a method
        without ``keep``, or with ``keep`` given in its spec.
        """
        name, _ = parse_spec(spec)
        kind = get_class(name)
        _, settings = parse_spec(spec, kind)
        known = {f.name: f.default for f in fields(kind)}
        if not solvable(spec):
            why = "fixes keep itself" if "keep" in settings else f"{name} has no setting keep to solve for"
            raise ValueError(f"{spec!r} cannot be brought to a budget: {why}; measure it as it is with --reduce")
        seen = self._seen.setdefault(spec, {})

        def at(knob: str, value: float) -> float:
            if (knob, value) not in seen:
                try:
                    seen[knob, value] = self.share((build(kind, {**settings, knob: value}),))
                except BudgetError:
                    if (knob, value) == ("keep", 1.0):
                        raise
                    seen[knob, value] = self.TOO_SMALL
            return seen[knob, value]

        self._bisect(seen, at, budget)
        if at("keep", self.LEAST) > budget + TOLERANCE and type(known.get("r")) is int and "r" not in settings:
            self._bisect_count(at, budget)

        # Rounded, so that equally near points are told apart: keep goes before r, and keeping more before less.
        def distance(point: tuple[str, float]) -> tuple[float, str, float]:
            return round(abs(seen[point] - budget), 6), point[0], -point[1] if point[0] == "keep" else point[1]

        knob, value = min((p for p, share in seen.items() if share >= 0), key=distance)
        return build(kind, {**settings, knob: value}), seen[knob, value]

    def _bisect(self, seen: dict[tuple[str, float], float], at: Callable[[str, float], float], budget: float) -> None:
        # Start from the nearest points that earlier budgets evaluated on either side.
        at("keep", self.LEAST), at("keep", 1.0)
        if axis_of(self.task) != FLOPS:  # of a share of tokens, keep itself is likely the answer
            at("keep", round(budget, 4))
        found = {value: share for (knob, value), share in seen.items() if knob == "keep"}
        low = max((k for k, s in found.items() if s <= budget), default=self.LEAST)
        high = min((k for k, s in found.items() if s >= budget and k >= low), default=1.0)
        for step in range(self.STEPS):
            below, above = at("keep", low), at("keep", high)
            if high - low <= self.FINE or min(abs(below - budget), abs(above - budget)) <= self.FINE:
                return
            span = above - below
            part = 0.5 if step % 2 or span <= 0 else min(0.9, max(0.1, (budget - below) / span))
            middle = round(low + part * (high - low), 4)
            if middle in (low, high):
                return
            low, high = (low, middle) if at("keep", middle) > budget else (middle, high)

    def _bisect_count(self, at: Callable[[str, float], float], budget: float) -> None:
        low, high = 1, 2
        while at("r", high) > budget and high < 1 << 16 and at("r", high) < at("r", low):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at("r", middle) > budget else (low, middle)


def points(
    task: Task,
    solver: Solver,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    reduce: Sequence[str] = (),
) -> list[Point]:
    """The rows to measure: the unreduced model, baselines and methods at every budget, explicit specs.

    ``methods`` None takes all that the model can serve, unless ``reduce`` names specs: then only those are measured.
    Every explicit spec is put into the budget that it happens to hit, or gets baselines at its own FLOPs; so is a
    method that no budget can be asked of.
    """
    baselines, stages = baselines_of(task), stages_of(task)
    if methods is None:
        chosen = [] if reduce else [m for m in task.methods() if m not in baselines]
    else:
        chosen = [m for m in check_methods(methods, task.stages, task.methods(), stages) if m not in baselines]
    shares = check_budgets(budgets) if chosen or not reduce else ()
    reduce = [*reduce, *(m for m in chosen if not solvable(m))]
    chosen = [m for m in chosen if m not in reduce]
    out = [Point(UNREDUCED, UNREDUCED, "", 1.0)]
    for budget in shares:
        out += [Point.at(spec, budget) for spec in (*baselines, *chosen)]
    hit = list(shares)
    for text in reduce:
        reducers = parse(text, stage=task.stages[0])
        if not reducers:
            known = ", ".join(full_name(get_class(n, s), stages) for s in task.stages for n in list_methods(stage=s))
            raise ValueError(f"--reduce {text!r} names no method; choose from {known}")
        spec = spec_of(reducers, stages)
        label = "+".join(full_name(type(r), stages) for r in reducers)
        try:
            share = solver.share(reducers)
        except Exception:  # measuring it gives the same error, and its row keeps it
            out.append(Point(spec, label, spec))
            continue
        near = [b for b in hit if abs(b - share) <= TOLERANCE / 3]
        if not near:
            near = [round(share, 3)]
            hit += near
            out += [Point.at(b, near[0]) for b in baselines]
        out.append(Point(spec, label, spec, near[0]))
    return list({p.id: p for p in out}.values())


def _measure(task: Task, solver: Solver, point: Point, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a point; one that solves to the settings of an earlier row takes over its results."""
    notes: list[str] = []
    axis = axis_of(task)
    if point.id == UNREDUCED:
        reducers: tuple[Reducer, ...] = ()
    elif point.solved:
        assert point.budget is not None
        one, reached = solver.solve(point.spec, point.budget)
        reducers = (one,)
        if abs(reached - point.budget) > TOLERANCE:
            wanted, got = f"{100 * point.budget:.4g} %", f"{100 * reached:.1f} %"
            notes.append(f"cannot reach {wanted} of the {axis.label}; {got} is the nearest that its settings allow")
    else:
        reducers = parse(point.spec, stage=task.stages[0])
    spec = spec_of(reducers, stages_of(task))
    twin = next((r for r in rows if reducers and r["spec"] == spec), None)
    if twin is not None:
        same = {k: v for k, v in twin.items() if k not in ("id", "method", "budget", "wall_s", "same_as")}
        own = [n for n in twin["notes"] if not n.startswith("cannot reach")]
        return {**same, "notes": [*notes, *own], "same_as": twin.get("same_as", twin["id"])}
    row = dict(task.measure(reducers))
    row["spec"] = spec
    row["settings"] = [r.to_json() for r in reducers]
    if "flops" in row:
        row["share"] = row["flops"] / solver.flops
    if axis.key not in row:
        row[axis.key] = solver.share(reducers)
    row["notes"] = [*notes, *row.get("notes", [])]
    unreduced = next((r for r in rows if r["id"] == UNREDUCED), None)
    return consistent(row, unreduced) if reducers else row


def sweep(
    task: Task,
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    reduce: Sequence[str] = (),
    fresh: bool = False,
    device: str = "cpu",
    command: str = "",
    watch: Watch | None = None,
) -> Run:
    """Measure every point of the sweep that ``out`` does not hold yet, and return the run with all rows.

    Rows that raised are kept with their message and tried again by the next call. Raises ``ValueError`` for bad
    settings or a folder with other settings, ``OSError`` for a folder that cannot be written, all before any
    computing, and whatever the unreduced model raises: without it there is nothing to compare with.
    """
    watch = watch or Watch()
    axis = axis_of(task)
    check_budgets(budgets, axis.label)
    for text in reduce:
        auto_of(text) if is_auto(text) else parse(text, stage=task.stages[0])
    if methods is not None:
        check_methods(methods, task.stages)
    info = {
        "task": task.name,
        "metric": task.metric,
        "axis": asdict(axis),
        "settings": task.settings(),
        "versions": versions(),
        "hardware": hardware(device),
        "command": command,
        "points": [],
        "problems": [],
    }
    with open_run(out, info, fresh=fresh) as writer:
        run = writer.run
        if run.repaired:
            watch.say(run.repaired)
        if (keep_in := getattr(task, "keep_in", None)) is not None:
            keep_in(run.folder)
        task.prepare()
        reduce = [_named(task, text, watch) for text in reduce]
        solver = Solver(task)
        todo = points(task, solver, methods, budgets, reduce)
        ids = [p.id for p in todo]
        _check_points(run, ids)
        writer.update(points=ids, command=command, problems=task.problems or run.info.get("problems", []))
        done = {r["id"] for r in run.good}
        if run.rows:
            again = f"; {len(run.errors)} with an error are measured again" if run.errors else ""
            watch.say(f"{len(done)} of {counted(len(ids), 'row')} are there already in {run.folder}{again}")
        watch.plan(len(ids), len(done))
        for point in todo:
            if point.id in done:
                continue
            watch.begin(point)
            began = time.perf_counter()
            row: dict[str, Any] = {"id": point.id, "method": point.method, "budget": point.budget, "spec": point.spec}
            try:
                row.update(_measure(task, solver, point, run.good))
            except Exception as error:
                if point.id == UNREDUCED:
                    raise
                row["error"] = f"{type(error).__name__}: {error}"
                row["traceback"] = traceback.format_exc(limit=-4)
            row["wall_s"] = round(time.perf_counter() - began, 3)
            row = writer.append(row)
            if task.problems:
                writer.update(problems=task.problems)
            watch.end(point, row)
        return run


def _named(task: Task, text: str, watch: Watch) -> str:
    """``text``, or what ``auto:`` stands for in the task's model. Raises ``ValueError`` where nothing is known."""
    if not is_auto(text):
        return text
    loaded: Any = getattr(task, "loaded", None)
    if loaded is None:
        raise ValueError(f"{text}: {task.name} has no model that it could be chosen for; name the methods")
    found = chosen_for(loaded.model, [text])
    watch.say(str(found))
    return found.spec


def _check_points(run: Run, ids: list[str]) -> None:
    """Rows may be added to a run, never left behind: a folder always belongs to the last command."""
    lost = [r["id"] for r in run.rows if r["id"] not in ids]
    if lost:
        shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise ValueError(
            f"{run.folder} holds rows that this sweep does not ask for ({shown}): "
            "its methods, budgets or --reduce differ. Name those as well, "
            "delete all rows with --fresh, or write to another folder with --out."
        )
