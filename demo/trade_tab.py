"""The tab Measure: a sweep on an embedded benchmark with a live Pareto plot, or an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.demo.common import Slider
from tokenreduce.demo.store import Store
from tokenreduce.demo.sweep_events import results
from tokenreduce.demo.trade import BUDGETS, Sweeps
from tokenreduce.demo.trade_events import FIRST, Events, Widgets

__all__ = ["Widgets", "add"]


def add(store: Store, page: gr.Blocks, tab: gr.Tab, folder: Path) -> None:
    """Build the ``tab`` of ``page``; runs go to ``folder``, each visitor's into one of its own."""
    sweeps = Sweeps(store, folder)
    if not sweeps.known:
        gr.Markdown("There is no benchmark for this model: start the page with `--data FOLDER` (labelled images).")
    states: dict[str, Any] = {"held": gr.State(None, time_to_live=3600), "opened": gr.State(False)}
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            settings = _settings(sweeps.known)
        with gr.Column(scale=5, min_width=300):
            shown = results("trade", FIRST, "Accuracy")
    Events(sweeps, Widgets(**settings, **shown, **states)).connect(page, tab)


def _settings(known: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "bench": gr.Dropdown(
            list(known), value=next(iter(known), None), label="Benchmark", elem_id="trade-bench", filterable=False
        ),
        "methods": gr.Dropdown(
            [], value=[], multiselect=True, label="Methods",
            elem_id="trade-methods", info="random, uniform and resize are in every sweep, and the unreduced model",
        ),
        "budgets": gr.CheckboxGroup(
            BUDGETS, value=list(BUDGETS[:3]), label="Budgets: share of the unreduced cost", elem_id="trade-budgets"
        ),
        "inputs": Slider(
            50, 1000, value=200, step=50, label="Held-out images or questions", elem_id="trade-inputs",
            info="more are slower and have smaller standard errors",
        ),
    }  # fmt: skip
    with gr.Row():
        out["go"] = gr.Button("Run", variant="primary", elem_id="trade-run", interactive=bool(known))
        out["stop"] = gr.Button("Stop", elem_id="trade-stop", interactive=False)
    out["earlier"] = gr.UploadButton(
        "Load an earlier run (rows.jsonl, with run.json if you have it)", file_count="multiple",
        file_types=[".jsonl", ".json"], elem_id="trade-load", type="filepath", size="sm",
    )  # fmt: skip
    return out
