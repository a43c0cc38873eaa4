"""The tab "Your model": agreement with itself, tokens, FLOPs and time of any model on photographs or uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.demo.answers import LONGEST_QUESTION
from tokenreduce.demo.common import Slider, models, said
from tokenreduce.demo.own import MOST, about, examples_of, lead, models_of, named, question_of
from tokenreduce.demo.own_events import FIRST, Events, Widgets, thumbnails
from tokenreduce.demo.store import Store
from tokenreduce.demo.sweep_events import results
from tokenreduce.demo.trade import BUDGETS, Sweeps
from tokenreduce.demo.uploads import IMAGES

__all__ = ["add"]


def add(store: Store, page: gr.Blocks, tab: gr.Tab, folder: Path) -> None:
    """Build the ``tab`` of ``page``; runs go to ``folder``, each visitor's into one of its own."""
    gr.Markdown(lead(store), elem_id="own-lead")
    if not (known := models_of(store)):
        return
    states: dict[str, Any] = {"held": gr.State(None, time_to_live=3600), "opened": gr.State(False)}
    states["mine"] = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            pictures = _pictures(store, known)
            settings = _settings(known[0] in store.languages, known[0])
        with gr.Column(scale=5, min_width=300):
            shown = results("own", FIRST, "Agreement with the unreduced model")
    Events(Sweeps(store, folder), Widgets(**pictures, **settings, **shown, **states)).connect(page, tab)


def _pictures(store: Store, known: list[str]) -> dict[str, Any]:
    model = gr.Dropdown(models(known), value=known[0], label="Model", elem_id="own-model", filterable=False)
    first = named(examples_of(store, known[0]))
    gallery = gr.Gallery(
        thumbnails(first), show_label=False, columns=4, height=190, allow_preview=False, object_fit="contain",
        elem_id="own-pictures", elem_classes="gallery-four", buttons=[], interactive=False,
    )  # fmt: skip
    told = gr.HTML(said(about(first, False)), elem_id="own-about", elem_classes="said small")
    upload = gr.UploadButton(
        "Upload pictures", file_count="multiple", file_types=list(IMAGES), elem_id="own-upload", type="filepath",
        size="sm",
    )  # fmt: skip
    back = gr.Button("Back to the first pictures", elem_id="own-back", size="sm", visible=False)
    return {"model": model, "gallery": gallery, "about": told, "upload": upload, "back": back}


def _settings(asks: bool, model: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "question": gr.Textbox(
            question_of(model), label="Question about every picture", elem_id="own-question", visible=asks,
            max_length=LONGEST_QUESTION,
        ),
        "methods": gr.Dropdown(
            [], value=[], multiselect=True, label="Methods", elem_id="own-methods",
            info="baselines are in every sweep, and the unreduced model",
        ),
        "budgets": gr.CheckboxGroup(
            BUDGETS, value=list(BUDGETS[:3]), label="Budgets: share of the unreduced cost", elem_id="own-budgets"
        ),
        "inputs": Slider(
            2, MOST, value=8, step=1, label="Pictures at most", elem_id="own-inputs",
            info="more are slower and have smaller standard errors",
        ),
    }  # fmt: skip
    with gr.Row():
        out["go"] = gr.Button("Run", variant="primary", elem_id="own-run")
        out["stop"] = gr.Button("Stop", elem_id="own-stop", interactive=False)
    return out
