"""The ask tab: one question about an image or a video, answered whole and with two reductions side by side."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tokenreduce.core.registry import list_methods
from tokenreduce.demo.answers import LONGEST_QUESTION, LONGEST_SPEC, NAMES
from tokenreduce.demo.ask import STAGES, START, about_words, examples_of, longest_of, missing
from tokenreduce.demo.ask_events import Controls, Events, Widgets, captioned
from tokenreduce.demo.common import NONE, Slider, keep_slider, message, method_dropdown, models
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import IMAGES, VIDEOS
from tokenreduce.zoo.examples import Example

__all__ = ["Widgets", "add"]


def add(store: Store, tab: gr.Tab) -> None:
    """Build the tab. The model is loaded when somebody opens the tab, not before."""
    if not store.languages:
        gr.Markdown(missing(), elem_id="ask-missing")
        return
    first, example = store.languages[0], examples_of(store.languages[0])[0]
    states: dict[str, Any] = {
        "frames": gr.State([example.image], time_to_live=3600), "video": gr.State(False),
        "right": gr.State(dict(example.questions)), "opened": gr.State(False),
    }  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            pictures = _pictures(store, example)
        with gr.Column(scale=5, min_width=300):
            questions = _questions(example, first)
            answers = _answers()
    Events(store, Widgets(**pictures, **questions, **answers, **states)).connect(tab)


def _pictures(store: Store, example: Example) -> dict[str, Any]:
    model = gr.Dropdown(
        models(store.languages), value=store.languages[0], label="Model", elem_id="ask-model", filterable=False
    )
    gr.Markdown("Examples:", elem_classes="hint")
    gallery = gr.Gallery(
        captioned(examples_of(store.languages[0])), columns=3, height=235, show_label=False, allow_preview=False,
        object_fit="contain", elem_id="ask-examples", elem_classes="gallery-examples", buttons=[], interactive=False,
    )  # fmt: skip
    upload = gr.UploadButton(
        "Upload an image or a video", file_types=[*IMAGES, *VIDEOS], elem_id="ask-upload", type="filepath", size="sm"
    )
    shown = gr.Image(
        example.image, label="The model is asked about", interactive=False, buttons=["fullscreen"], height=220,
        elem_id="ask-shown", format="png",
    )  # fmt: skip
    return {"model": model, "gallery": gallery, "upload": upload, "shown": shown}


def _questions(example: Example, model: str) -> dict[str, Any]:
    texts = [text for text, _ in example.questions]
    out: dict[str, Any] = {"warning": message("ask-message")}
    out["question"] = gr.Textbox(
        texts[0], label="Question", elem_id="ask-question", max_length=4 * LONGEST_QUESTION, submit_btn=False,
        placeholder="What is in this picture?", info=about_words(model) or None,
    )  # fmt: skip
    out["suggested"] = gr.Dropdown(
        texts, value=texts[0], label="Suggestions for this picture", elem_id="ask-suggested", visible=bool(texts)
    )
    with gr.Row():
        made = [_column(name, START[name]) for name in NAMES]
    out["specs"], out["lists"], out["columns"] = (list(parts) for parts in zip(*made, strict=True))
    with gr.Row():
        out["longest"] = Slider(
            1, 64, value=longest_of(model), step=1, label="Longest answer, tokens", elem_id="ask-longest"
        )
        out["go"] = gr.Button("Ask", variant="primary", elem_id="ask-go")
    return out


def _answers() -> dict[str, Any]:
    table = gr.HTML(elem_id="ask-answers")
    with gr.Row():
        kept = [
            gr.Image(
                label=f"{name}: tokens left at the end", interactive=False, buttons=["fullscreen", "download"],
                elem_id=f"ask-kept-{name}", height=340, format="png", min_width=240,
            )
            for name in NAMES
        ]  # fmt: skip
    return {"table": table, "kept": kept, "plot": gr.Plot(show_label=False, elem_id="ask-plot")}


def _column(name: str, start: dict[str, tuple[str, int]]) -> tuple[gr.Textbox, gr.Column, Controls]:
    """A dropdown and a slider per stage, and a text that may stand in their place."""
    out: Controls = {}
    with gr.Column(min_width=260):
        gr.Markdown(f"**Reduction {name}**")
        spec = gr.Textbox(
            label="As text, in place of the lists", elem_id=f"ask-{name}-spec", max_length=2 * LONGEST_SPEC,
            placeholder="tome:r=8+divprune:keep=64", info="method:setting=value, several with +; Enter asks",
        )  # fmt: skip
        with gr.Column() as lists:
            for stage, label in STAGES.items():
                method, percent = start.get(stage, (NONE, 20))
                names = list_methods(stage=stage)
                how = method_dropdown(stage, names, method, f"ask-{name}-{stage}", optional=True, label=label)
                there = {"visible": method != NONE}
                slider = keep_slider("Visual tokens kept there, %", percent, f"ask-{name}-{stage}-keep", **there)
                out[stage] = how, slider
    return spec, lists, out
