"""The first tab: the trade-off of every method from stored rows, and one picture at the chosen point of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from tokenreduce.bench.runs import Run
from tokenreduce.demo.common import Slider, message, said
from tokenreduce.demo.image import enlarged
from tokenreduce.demo.overview import model_of, start, title_of
from tokenreduce.demo.overview_events import Events, Widgets, values_of
from tokenreduce.demo.overview_pictures import pictures_of, the_picture
from tokenreduce.demo.store import Store

__all__ = ["Widgets", "add"]

WHAT = "Every line is a method, grey ones are baselines, bars are standard errors; the star is the unreduced model."
KEPT = "A patch alone in its token keeps its pixels; merged patches show their mean colour; dropped ones are dark."


def add(store: Store, runs: Sequence[Run], why: str, page: gr.Blocks) -> None:
    """Build the tab inside ``page`` for ``runs``; without any it says ``why``."""
    if not runs:
        gr.HTML(said(why), elem_id="overview-missing", elem_classes="said")
        return
    first, asked = runs[0], start(runs[0])
    values = values_of(first, asked)
    hidden: dict[str, Any] = {
        "here": gr.Textbox(visible=False), "at": gr.State(asked.budget), "picture": gr.State(asked.picture),
        "clicked": gr.Textbox(visible=False), "point": gr.Button(visible="hidden", elem_id="overview-point"),
    }  # fmt: skip
    with gr.Row():
        controls = _controls(runs, values)
    told = _told(values)
    with gr.Row():
        with gr.Column(scale=6, min_width=300):
            measured = _measured(values)
        with gr.Column(scale=5, min_width=300):
            seen = _seen(first, asked.picture, values)
    lines = _lines(values)
    Events(store, runs, Widgets(**hidden, **controls, **told, **measured, **seen, **lines)).connect(page)


def _controls(runs: Sequence[Run], values: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": gr.Dropdown(
            [(title_of(r), model_of(r)) for r in runs], value=model_of(runs[0]), label="Model", elem_id="overview-run",
            filterable=False, min_width=220,
        ),
        "budget": Slider(**values["budget"], elem_id="overview-budget", min_width=280, buttons=[]),
        "method": gr.Dropdown(**values["method"], label="Method", elem_id="overview-method", min_width=220),
    }  # fmt: skip


def _told(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "warning": message("overview-message"),
        "headline": gr.HTML(values["headline"], elem_id="overview-headline", elem_classes="said"),
    }


def _measured(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"plot": gr.Plot(values["plot"], show_label=False, elem_id="overview-plot")}
    gr.Markdown(
        WHAT + " A * marks what misses the budget. Click on a point or on a row to see it on the picture.",
        elem_classes="hint",
    )
    out["table"] = gr.Dataframe(
        **values["table"], elem_id="overview-rows", interactive=False, show_label=False, max_height=300, buttons=[]
    )
    return out


def _seen(run: Run, number: int, values: dict[str, Any]) -> dict[str, Any]:
    look: dict[str, Any] = {"interactive": False, "type": "pil", "buttons": ["fullscreen"], "format": "png"}
    look |= {"height": 260, "min_width": 140}
    with gr.Row():
        before = gr.Image(
            enlarged(the_picture(run, number).image), label="The picture", elem_id="overview-before", **look
        )  # fmt: skip
        after = gr.Image(label="What is left of it", elem_id="overview-after", **look)
    out: dict[str, Any] = {"before": before, "after": after}
    out["about"] = gr.HTML(elem_id="overview-about", elem_classes="said")
    out["question"] = gr.Dropdown(**values["question"], label="Question", elem_id="overview-question", filterable=False)
    out["answers"] = gr.HTML(elem_id="overview-answers")
    gr.Markdown(f"{KEPT} Other pictures, held out from training:", elem_classes="hint")
    out["gallery"] = gr.Gallery(
        [p.image for p in pictures_of(run)], show_label=False, columns=6, height=110, allow_preview=False,
        object_fit="contain", elem_id="overview-pictures", elem_classes="gallery-row", buttons=[], interactive=False,
    )  # fmt: skip
    return out


def _lines(values: dict[str, Any]) -> dict[str, Any]:
    code: dict[str, Any] = {
        "interactive": False, "show_line_numbers": False, "lines": 1, "buttons": ["copy"], "wrap_lines": True,
    }  # fmt: skip
    with gr.Row():
        python = gr.Code(
            values["python"], "python", label="In Python (import tokenreduce as tr)", elem_id="overview-python",
            min_width=280, **code,
        )  # fmt: skip
        shell = gr.Code(values["shell"], "shell", label="In a shell", elem_id="overview-shell", min_width=280, **code)
    link = gr.Textbox(
        values["link"], label="Link to what you see", elem_id="overview-link", interactive=False, buttons=["copy"],
        max_lines=3,
    )  # fmt: skip
    return {"python": python, "shell": shell, "link": link}
