"""The image tab: one picture through one model, without and with a reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from tokenreduce.core.registry import list_methods
from tokenreduce.demo.common import Slider, keep_slider, message, method_dropdown, models
from tokenreduce.demo.image import thumbnails
from tokenreduce.demo.image_events import Events, Widgets
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import IMAGES

__all__ = ["START", "Widgets", "add"]

#: The method and the share of patch tokens, in percent, that the page starts with.
START = "tome", 35
ABOUT = (
    "A patch alone in its token keeps its pixels; merged patches show their mean colour with a line of one colour "
    "around them; dropped patches are dark."
)


def add(store: Store, opens: Callable[..., Any]) -> None:
    """Build the tab; ``opens`` ties a function to the moment when a visitor first sees it."""
    states: dict[str, Any] = {"picture": gr.State(None, time_to_live=3600), "seen": gr.State(None, time_to_live=3600)}
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            inputs = _inputs(store)
        with gr.Column(scale=5, min_width=300):
            answers = _answers()
    Events(store, Widgets(**inputs, **answers, **states, truth=gr.State(""))).connect(opens)


def _inputs(store: Store) -> dict[str, Any]:
    first = store.images[0]
    model = gr.Dropdown(models(store.images), value=first, label="Model", elem_id="image-model", filterable=False)
    # The page does not wait for an embedded model; what it can do is known when somebody sees the tab. An own one that
    # cannot be loaded is told at once.
    names = store.methods(first)["encoder"] if first == store.own else list_methods(stage="encoder")
    method = method_dropdown("encoder", names, START[0], "image-method", label="Method")
    keep = keep_slider("Patch tokens left after the last layer, %", START[1], "image-keep")
    batch = gr.Dropdown([1, 8, 32], value=8, label="Images per timed forward", elem_id="image-batch", filterable=False)
    gr.Markdown("Examples, held out from training:", elem_classes="hint")
    gallery = gr.Gallery(
        thumbnails(first), show_label=False, columns=3, height=235, allow_preview=False, object_fit="contain",
        elem_id="image-examples", elem_classes="gallery-examples", buttons=[], interactive=False,
    )  # fmt: skip
    upload = gr.UploadButton(
        "Upload an image", file_types=list(IMAGES), elem_id="image-upload", type="filepath", size="sm"
    )
    return {"model": model, "method": method, "keep": keep, "batch": batch, "gallery": gallery, "upload": upload}


def _answers() -> dict[str, Any]:
    out: dict[str, Any] = {"warning": message("image-message")}
    look: dict[str, Any] = {
        "interactive": False,
        "type": "pil",
        "buttons": ["fullscreen", "download"],
        "height": 300,
        "format": "png",
    }
    with gr.Row():
        with gr.Column(min_width=230):
            out["before"] = gr.Image(label="What the model sees", elem_id="image-before", **look)
        with gr.Column(min_width=230):
            out["after"] = gr.Image(label="Tokens that are left", elem_id="image-after", **look)
    out["layer"] = Slider(1, 6, value=6, step=1, label="Picture after layer", elem_id="image-layer")
    out["caption"] = gr.HTML(elem_id="image-caption", elem_classes="said")
    gr.Markdown(ABOUT, elem_classes="hint")
    with gr.Row():
        out["stock"] = gr.Label(label="Prediction, unreduced", elem_id="image-stock", min_width=200)
        out["reduced"] = gr.Label(label="Prediction, reduced", elem_id="image-reduced", min_width=200)
    out["table"] = gr.Markdown(elem_id="image-facts", elem_classes="facts")
    out["plot"] = gr.Plot(show_label=False, elem_id="image-plot")
    return out
