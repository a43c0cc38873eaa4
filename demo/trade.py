"""The trade-off tab: a sweep on an embedded benchmark with a live Pareto plot, or an earlier run."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.bench.columns import cell, columns, failure, label, ordered
from tokenreduce.bench.live import Progress, follow_sweep
from tokenreduce.bench.page import write_html
from tokenreduce.bench.plot import trade_axes, trade_plot
from tokenreduce.bench.report import write_csv
from tokenreduce.bench.runs import Run, read_run
from tokenreduce.bench.safely import safetensors_only
from tokenreduce.bench.sweep import UNREDUCED, full_name, is_baseline
from tokenreduce.bench.task import Task
from tokenreduce.bench.vision import VisionTask
from tokenreduce.bench.vlm import STAGES, VlmTask
from tokenreduce.core.registry import get_class
from tokenreduce.demo.common import explain, message, received, short
from tokenreduce.demo.store import Store

__all__ = ["add", "benchmarks", "methods_of", "rows_of", "task_of"]

BUDGETS = ("75 %", "50 %", "35 %", "25 %", "10 %")
AXES = {"cost": "cost", "flops": "FLOPs", "tokens": "tokens", "clock": "measured time"}
START = ("tome", "evit", "visionzip", "fastv")
BATCH, REPEATS = 16, 3


def benchmarks(store: Store) -> dict[str, str]:
    """What can be run, by what the page calls it, with the model."""
    out: dict[str, str] = {}
    for name in store.images:
        if name == store.own and name not in ("digits-vit", "world-vit"):
            if store.data is not None:
                out[f"{short(name)} on {short(store.data)}"] = name
        else:
            out[f"{name} on held-out {'digits' if name == 'digits-vit' else 'scenes'}"] = name
    for name in store.languages:
        out[f"{short(name)} on questions about the world"] = name
    return out


def task_of(store: Store, model: str, inputs: int) -> Task:
    """The benchmark of a model on at most ``inputs`` images or questions."""
    if model in store.languages:
        return VlmTask(model=model, limit=inputs, device=store.device, repeats=REPEATS)
    own = {"digits-vit": "digits", "world-vit": "world"}
    data = own.get(model) or str(store.data)
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


def add(store: Store, page: gr.Blocks, folder: Path) -> None:
    """Build the tab inside ``page``; runs go to ``folder``, each visitor's into one of its own."""
    known = benchmarks(store)
    stops: dict[str, threading.Event] = {}
    if not known:
        gr.Markdown("There is no benchmark for this model: start the page with `--data FOLDER` (labelled images).")
    first = next(iter(known), None)
    names = methods_of(store, known[first]) if first else []
    held = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            bench = gr.Dropdown(list(known), value=first, label="Benchmark", elem_id="trade-bench", filterable=False)
            methods = gr.Dropdown(
                names, value=[n for n in START if n in names], multiselect=True, label="Methods",
                elem_id="trade-methods", info="random, uniform and resize are in every sweep, and the unreduced model",
            )  # fmt: skip
            budgets = gr.CheckboxGroup(
                BUDGETS, value=list(BUDGETS[:3]), label="Budgets: share of the unreduced cost", elem_id="trade-budgets"
            )
            inputs = gr.Slider(
                50, 1000, value=200, step=50, label="Held-out images or questions", elem_id="trade-inputs",
                info="more are slower and have smaller standard errors",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button("Run", variant="primary", elem_id="trade-run", interactive=bool(known))
                stop = gr.Button("Stop", elem_id="trade-stop", interactive=False)
            earlier = gr.UploadButton(
                "Load an earlier run (rows.jsonl, with run.json if you have it)", file_count="multiple",
                file_types=[".jsonl", ".json"], elem_id="trade-load", type="filepath", size="sm",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=300):
            warning = message("trade-message")
            state = gr.Markdown("Choose methods and press Run: the plot grows row by row.", elem_id="trade-state")
            against = gr.Radio(
                [(text, key) for key, text in AXES.items() if key != "cost"], value="flops", label="Accuracy against",
                elem_id="trade-against",
            )  # fmt: skip
            plot = gr.Plot(show_label=False, elem_id="trade-plot")
            with gr.Row():
                as_csv = gr.DownloadButton("Download CSV", interactive=False, elem_id="trade-csv", size="sm")
                as_html = gr.DownloadButton("Download HTML report", interactive=False, elem_id="trade-html", size="sm")
            table = gr.Dataframe(
                elem_id="trade-rows", interactive=False, wrap=False, show_label=False, max_height=420, visible=False
            )

    shown = [warning, state, held, plot, as_csv, as_html, table, go, stop]

    def present(run: Run, axis: str, files: dict[str, Path] | None) -> dict[Any, Any]:
        heads, body = rows_of(run)
        out: dict[Any, Any] = {
            held: run,
            plot: _plot(run, axis),
            table: gr.Dataframe({"headers": heads, "data": body}, visible=True),
        }
        for button, kind in ((as_csv, "csv"), (as_html, "html")):
            ready = files is not None
            out[button] = gr.DownloadButton(value=str(files[kind]) if files else None, interactive=ready)
        return out

    def start(
        what: str, wanted: list[str], shares: list[str], n: float, axis: str, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        mine = folder / str(request.session_hash)
        event = stops[str(request.session_hash)] = threading.Event()
        idle = {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
        yield {
            warning: "",
            state: "loading model and data ...",
            go: gr.Button(interactive=False),
            stop: gr.Button(interactive=True),
        }
        try:
            if not wanted or not shares:
                raise ValueError(f"choose at least one {'budget' if wanted else 'method'}")
            if what not in known:
                raise ValueError("choose a benchmark")
            task = task_of(store, known[what], int(n))
            parts = [float(text.removesuffix(" %")) / 100 for text in shares]
            with safetensors_only():
                task.prepare()
            out = mine / _key(task, wanted, parts)
            for progress in follow_sweep(
                task, out, event, turn=store.turn, methods=wanted, budgets=parts, device=store.device
            ):
                if progress.state == "running":
                    yield {state: _said(progress), **(present(progress.run, axis, None) if progress.run else {})}
                else:
                    files = _files(progress.run, out) if progress.run else None
                    yield {
                        state: _said(progress),
                        **idle,
                        **(present(progress.run, axis, files) if progress.run else {}),
                    }
        except Exception as error:
            yield {warning: explain(error), state: "", **idle}

    def halt(request: gr.Request) -> dict[Any, Any]:
        if event := stops.get(str(request.session_hash)):
            event.set()
        return {state: "stopping behind the row that is being measured ...", stop: gr.Button(interactive=False)}

    def load(paths: list[str], axis: str, request: gr.Request) -> dict[Any, Any]:
        try:
            with received(paths) as files:
                run = _read(files)
                run.folder = folder / str(request.session_hash) / "earlier"
                run.folder.mkdir(parents=True, exist_ok=True)
                what = run.info.get("settings") or {}
                name = " on ".join(str(what[k]) for k in ("model", "data") if what.get(k)) or "an earlier run"
                return {
                    warning: "", state: f"{name}: {len(run.good)} rows, {len(run.errors)} failed",
                    **present(run, axis, _files(run, run.folder)),
                }  # fmt: skip
        except Exception as error:
            return {warning: explain(error)}

    def again(run: Run | None, axis: str) -> Any:
        return gr.skip() if run is None else _plot(run, axis)

    def switched(what: str) -> Any:
        names = methods_of(store, known[what])
        return gr.Dropdown(names, value=[n for n in START if n in names])

    def left(request: gr.Request) -> None:
        if event := stops.pop(str(request.session_hash), None):
            event.set()
        shutil.rmtree(folder / str(request.session_hash), ignore_errors=True)

    bench.input(switched, bench, methods, show_progress="hidden")
    go.click(start, [bench, methods, budgets, inputs, against], shown, concurrency_id="sweep", concurrency_limit=1,
             show_progress="hidden")  # fmt: skip
    stop.click(halt, None, [state, stop], show_progress="hidden")
    against.input(again, [held, against], plot, show_progress="hidden")
    earlier.upload(load, [earlier, against], shown, show_progress="hidden")
    page.unload(left)


def _plot(run: Run, axis: str) -> Any:
    have = trade_axes(run)
    return trade_plot(run, axis if axis in have else "cost", height=500, below=True)


def _said(progress: Progress) -> str:
    if progress.state == "done":
        failed = len(progress.run.errors) if progress.run else 0
        return f"Done: {progress.total} rows" + (f", {failed} failed" if failed else "")
    if progress.state == "stopped":
        return f"Stopped: {progress.done} of {progress.total} rows are there. Run continues from here."
    return f"{progress.done} of {progress.total or '?'} rows; now `{progress.now}`"


def _key(task: Task, methods: Sequence[str], budgets: Sequence[float]) -> str:
    """One folder for each sweep, so that the same one continues where it stopped."""
    text = json.dumps([task.name, task.settings(), sorted(methods), sorted(budgets)], default=str)
    return f"{task.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _files(run: Run, folder: Path) -> dict[str, Path]:
    return {"csv": write_csv([run], folder / "rows.csv"), "html": write_html([run], folder / "report.html")}


def _read(files: Sequence[Path]) -> Run:
    rows = [f for f in files if f.suffix == ".jsonl"]
    infos = [f for f in files if f.suffix == ".json"]
    if len(rows) != 1 or len(infos) > 1:
        raise ValueError("choose one rows.jsonl, with its run.json if you have it")
    return read_run(rows[0], infos[0] if infos else None)
