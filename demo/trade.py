"""What the tab Measure does: sweeps on the benchmarks of a page, one after the other, and earlier runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.columns import cell, columns, failure, label, ordered
from tokenreduce.bench.live import Progress, follow_sweep
from tokenreduce.bench.methods import UNREDUCED, full_name, is_baseline
from tokenreduce.bench.page import write_html
from tokenreduce.bench.plot import trade_axes, trade_plot
from tokenreduce.bench.report import write_csv
from tokenreduce.bench.runs import Run, read_run
from tokenreduce.bench.safely import safetensors_only
from tokenreduce.bench.task import Task
from tokenreduce.bench.vision import VisionTask
from tokenreduce.bench.vlm import STAGES, VlmTask
from tokenreduce.bench.vlms import EMBEDDED as LANGUAGE
from tokenreduce.core.registry import get_class
from tokenreduce.demo.common import WAITING, short
from tokenreduce.demo.store import Store

__all__ = [
    "BUDGETS", "WAITING", "Sweeps", "benchmarks", "check_choice", "drawn", "files_of", "methods_of", "rows_of",
    "said_of", "task_of", "title_of",
]  # fmt: skip

#: Embedded classifiers and their data.
EMBEDDED = {"digits-vit": "digits", "world-vit": "world", "world-vit-2": "world2"}
BUDGETS = ("75 %", "50 %", "35 %", "25 %", "10 %")
BATCH, REPEATS = 16, 3


def benchmarks(store: Store) -> dict[str, str]:
    """What can be run, by what the page calls it, with the model."""
    out: dict[str, str] = {}
    name: str
    for name in store.images:
        if name == store.own and name not in EMBEDDED:
            if store.data is not None:
                out[f"{short(name)} on {short(store.data)}"] = name
        else:
            out[f"{name} on held-out {'digits' if name == 'digits-vit' else 'scenes'}"] = name
    for name in store.languages:
        second = " 2" if LANGUAGE.get(name) == "world2" else ""
        out[f"{short(name)} on questions about the world{second}"] = name
    return out


def task_of(store: Store, model: str, inputs: int) -> Task:
    """The benchmark of a model on at most ``inputs`` images or questions."""
    if model in store.languages:
        second = LANGUAGE.get(model) == "world2"
        more: dict[str, Any] = {"data": "world2", "max_new_tokens": 64, "batch": BATCH} if second else {}
        return VlmTask(model=model, limit=inputs, device=store.device, repeats=REPEATS, **more)
    data = EMBEDDED.get(model) or str(store.data)
    classes = store.classes if model == store.own else None
    return VisionTask(
        model=model, data=data, limit=inputs, batch=BATCH, device=store.device, repeats=REPEATS, classes=classes
    )


def methods_of(store: Store, model: str) -> list[str]:
    """Full names of the methods that a sweep of ``model`` can choose from; its baselines are always there."""
    served = store.methods(model)
    several = STAGES if model in store.languages else ("encoder",)
    return [
        full for stage in several for name in served.get(stage, [])
        if not is_baseline(full := full_name(get_class(name, stage), several))
    ]  # fmt: skip


def rows_of(run: Run) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of a run, as the reports order them."""
    shown = [c for c in columns([run]) if c.drop <= 4]
    body = []
    for row in ordered(run):
        budget = "" if row["id"] == UNREDUCED or row.get("budget") is None else f"{100 * row['budget']:.4g} %"
        cells = (
            [failure(row), *[""] * (len(shown) - 1)] if row.get("error") else [cell(row, c, run.axis) for c in shown]
        )
        body.append([budget, label(row), *cells])
    return ["budget", "method", *(c.label for c in shown)], body


class Sweeps:
    """The sweeps of a page's visitors: one at a time, each in a folder of its visitor, each may be stopped.

    Args:
        store: models, and the machine's turn.
        folder: takes the runs, a folder per visitor.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.known = benchmarks(store)
        self.line = store.line  # of all tabs
        self._stops: dict[str, threading.Event] = {}

    def run(
        self, visitor: str, what: str, methods: Sequence[str], budgets: Sequence[str], inputs: int
    ) -> Iterator[tuple[Progress, Path]]:
        """Sweep a benchmark and yield how far it is, with the folder of the run; first its place among those that
        wait. Raises ``ValueError`` for what cannot be run, and what a sweep raises."""
        check_choice(methods, budgets)
        if what not in self.known:
            raise ValueError(f"choose a benchmark: {', '.join(self.known) or 'there is none'}")
        yield from self.follow(visitor, task_of(self.store, self.known[what], inputs), methods, budgets)

    def follow(
        self, visitor: str, task: Task, methods: Sequence[str], budgets: Sequence[str]
    ) -> Iterator[tuple[Progress, Path]]:
        """:meth:`run` of any ``task``."""
        check_choice(methods, budgets)
        if self.line.waiting >= WAITING:
            raise ValueError(f"{self.line.waiting} sweeps wait already; try again later")
        event = self._stops[visitor] = threading.Event()
        shares = [float(text.removesuffix(" %")) / 100 for text in budgets]
        out = self.folder / visitor / _key(task, methods, shares)

        def load() -> None:
            with safetensors_only():
                task.prepare()

        try:
            for progress in follow_sweep(
                task, out, event, turn=self.store.turn, line=self.line, before=load, methods=methods, budgets=shares,
                device=self.store.device,
            ):  # fmt: skip
                yield progress, out
        finally:
            if self._stops.get(visitor) is event:
                del self._stops[visitor]

    def runs(self, visitor: str) -> bool:
        """Whether a visitor has a sweep that runs or waits."""
        return visitor in self._stops

    def stop(self, visitor: str) -> None:
        """End a visitor's sweep behind the row it is at, or take it out of the line."""
        if event := self._stops.get(visitor):
            event.set()

    def leave(self, visitor: str) -> None:
        """Stop a visitor's sweep and forget all that is theirs."""
        self.stop(visitor)
        shutil.rmtree(self.folder / visitor, ignore_errors=True)

    def earlier(self, visitor: str, files: Sequence[Path]) -> Run:
        """A run that a visitor uploads, with a folder for its reports. Raises ``ValueError`` for other files."""
        run = _read(files)
        run.folder = self.folder / visitor / "earlier"
        run.folder.mkdir(parents=True, exist_ok=True)
        return run


def check_choice(methods: Sequence[str], budgets: Sequence[str]) -> None:
    """Raise ``ValueError`` where there is nothing to sweep."""
    if not methods or not budgets:
        raise ValueError(f"choose at least one {'budget' if methods else 'method'}")


def drawn(run: Run, axis: str) -> Any:
    """The plot of a run against ``axis``, or against its own where it has none of that."""
    have = trade_axes(run)
    return trade_plot(run, axis if axis in have else "cost", height=500, below=True)


def said_of(progress: Progress) -> str:
    """How far a sweep is, in words."""
    if progress.state == "waiting":
        before = "1 sweep is" if progress.ahead == 1 else f"{progress.ahead} sweeps are"
        return f"In the queue: {before} before yours, it is number {progress.ahead + 1}. Stop leaves the queue."
    if progress.state == "stopped" and not progress.total:
        return "Stopped before the first row."
    if progress.state == "done":
        failed = len(progress.run.errors) if progress.run else 0
        return f"Done: {progress.total} rows" + (f", {failed} failed" if failed else "")
    if progress.state == "stopped":
        return f"Stopped: {progress.done} of {progress.total} rows are there. Run continues from here."
    return f"{progress.done} of {progress.total or '?'} rows; now {progress.now}"


def _key(task: Task, methods: Sequence[str], budgets: Sequence[float]) -> str:
    """One folder for each sweep, so that the same one continues where it stopped."""
    text = json.dumps([task.name, task.settings(), sorted(methods), sorted(budgets)], default=str)
    return f"{task.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def title_of(run: Run) -> str:
    """What an uploaded run is about, as it says itself."""
    what = run.info.get("settings") or {}
    name = " on ".join(str(what[k]) for k in ("model", "data") if what.get(k)) or "an earlier run"
    return f"{name}: {len(run.good)} rows, {len(run.errors)} failed"


def files_of(run: Run, folder: Path) -> dict[str, Path]:
    """The run as files to take away, by kind."""
    return {"csv": write_csv([run], folder / "rows.csv"), "html": write_html([run], folder / "report.html")}


def _read(files: Sequence[Path]) -> Run:
    rows = [f for f in files if f.suffix == ".jsonl"]
    infos = [f for f in files if f.suffix == ".json"]
    if len(rows) != 1 or len(infos) > 1:
        raise ValueError("choose one rows.jsonl, with its run.json if you have it")
    return read_run(rows[0], infos[0] if infos else None)
