"""The ask tab: one question about an image or a video, answered whole and with two reductions side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.core.registry import list_methods
from tokenreduce.demo.answers import LONGEST_QUESTION, NAMES, answers, put, reducers_from
from tokenreduce.demo.common import (
    HEAVY,
    NONE,
    explain,
    keep_slider,
    message,
    method_choices,
    method_dropdown,
    models,
    received,
)
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import IMAGES, VIDEOS, image_from, is_video, video_from
from tokenreduce.measure.generation import compare_several
from tokenreduce.measure.kept import kept_views, sheet
from tokenreduce.measure.plots import visual_layers_plot
from tokenreduce.zoo.examples import Example, clip_examples, scene_examples

__all__ = ["add", "missing"]

STAGES = {
    "encoder": "Inside the vision encoder",
    "projector": "Before the language model",
    "language": "Inside the language model",
}
#: What the two columns start with: method by stage, and the share of tokens that it keeps in percent.
START = {"A": {"projector": ("visionzip", 20)}, "B": {"language": ("fastv", 20)}}
FRAMES, ROUNDS = 8, 3
Controls = dict[str, tuple[Any, Any]]


def missing() -> str:
    """What the tab says where there is no model that answers questions."""
    return (
        "The embedded `world-llava` answers questions about pictures, but its weights are not in this installation "
        "(`tokenreduce train world-llava --help` makes them). To ask a model of your own, start the page with "
        "`tokenreduce demo --model FOLDER_OR_HUB_ID`."
    )


def examples_of() -> tuple[Example, ...]:
    """Scenes and, behind them, clips."""
    return (*scene_examples(6)[:4], *clip_examples(2))


def add(store: Store, tab: gr.Tab) -> None:
    """Build the tab. The model is loaded when somebody opens the tab, not before."""
    if not store.languages:
        gr.Markdown(missing(), elem_id="ask-missing")
        return
    first = store.languages[0]
    embedded = first == "world-llava"
    example = examples_of()[0]
    texts = [text for text, _ in example.questions]
    frames, video = gr.State([example.image], time_to_live=3600), gr.State(False)
    right = gr.State(dict(example.questions))
    opened = gr.State(False)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(
                models(store.languages), value=first, label="Model", elem_id="ask-model", filterable=False
            )
            gr.Markdown("Examples, held out from training:", elem_classes="hint")
            gallery = gr.Gallery(
                [(e.image, "clip" if e.frames else "") for e in examples_of()], columns=3, height=235,
                show_label=False, allow_preview=False, object_fit="contain",
                elem_id="ask-examples", elem_classes="gallery-examples", buttons=[], interactive=False,
            )  # fmt: skip
            upload = gr.UploadButton(
                "Upload an image or a video",
                file_types=[*IMAGES, *VIDEOS],
                elem_id="ask-upload",
                type="filepath",
                size="sm",
            )
            shown = gr.Image(
                example.image, label="The model is asked about", interactive=False, buttons=["fullscreen"], height=220,
                elem_id="ask-shown", format="png",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=300):
            warning = message("ask-message")
            question = gr.Textbox(
                texts[0], label="Question", elem_id="ask-question", max_length=4 * LONGEST_QUESTION, submit_btn=False,
                placeholder="what color is the star" if embedded else "What is in this picture?",
                info="world-llava knows the words of its small world only, see the suggestions" if embedded else None,
            )  # fmt: skip
            suggested = gr.Dropdown(
                texts, value=texts[0], label="Suggestions for this picture", elem_id="ask-suggested", visible=embedded
            )
            with gr.Row():
                columns = [_column(name, START[name]) for name in NAMES]
            with gr.Row():
                longest = gr.Slider(
                    1, 64, value=1 if embedded else 24, step=1, label="Longest answer, tokens", elem_id="ask-longest"
                )
                go = gr.Button("Ask", variant="primary", elem_id="ask-go")
            table = gr.HTML(elem_id="ask-answers")
            with gr.Row():
                kept = [
                    gr.Image(
                        label=f"{name}: tokens left at the end", interactive=False, buttons=["fullscreen", "download"],
                        elem_id=f"ask-kept-{name}", height=340, format="png", min_width=240,
                    )
                    for name in NAMES
                ]  # fmt: skip
            plot = gr.Plot(show_label=False, elem_id="ask-plot")

    settings = [control for column in columns for pair in column.values() for control in pair]
    inputs = [model, frames, video, right, question, longest, *settings]
    results = [warning, table, *kept, plot]
    chosen_outputs = [warning, frames, video, right, shown, suggested, question]

    def run(
        name: str, seen: list[Image.Image], is_clip: bool, known: dict[str, str], text: str, most: float, *rest: Any
    ) -> Any:
        try:
            several = reducers_from(rest, [*STAGES])
            with store.turn:
                loaded = store.copy(name)
                asked, where = put(loaded, seen, is_clip, text or "")
                made = compare_several(
                    loaded.model, loaded.processor, asked, several, max_new_tokens=int(most), rounds=ROUNDS
                )
            sides = {"unreduced": made[0].stock.layers}
            sides |= {f"{n}: {r.spec}": r.reduced.layers for n, r in zip(NAMES, made, strict=True)}
            drawn = [sheet([view for view, _ in kept_views(r, where)]) for r in made]
            right_one = known.get(" ".join(text.split()), "")
            return {
                warning: "", table: answers(made, right_one), **dict(zip(kept, drawn, strict=True)),
                plot: visual_layers_plot(sides),
            }  # fmt: skip
        except Exception as error:
            return {warning: explain(error)}

    def again(name: str, *values: Any) -> Any:
        """Follow every change at once where a model is small enough."""
        return run(name, *values) if name == "world-llava" else gr.skip()

    def take(images: list[Image.Image], is_clip: bool, known: dict[str, str]) -> dict[Any, Any]:
        texts = list(known)
        return {
            warning: "", frames: images, video: is_clip, right: known, shown: sheet(images),
            suggested: gr.Dropdown(texts, value=texts[0] if texts else None),
            **({question: texts[0]} if texts else {}),
        }  # fmt: skip

    def picked(event: gr.SelectData) -> dict[Any, Any]:
        example = examples_of()[event.index]
        return take(list(example.frames or (example.image,)), bool(example.frames), dict(example.questions))

    def uploaded(path: str) -> dict[Any, Any]:
        try:
            with received(path) as files:
                if is_video(files[0]):
                    return take(video_from(files[0], FRAMES)[0], True, {})
                return take([image_from(files[0])], False, {})
        except Exception as error:
            return {warning: explain(error)}

    def fitting(name: str) -> dict[Any, Any]:
        """Only what this model can do, with the methods that the page starts with where it can do them."""
        served = store.methods(name)
        out: dict[Any, Any] = {longest: 1 if name == "world-llava" else 24}
        for column, column_name in zip(columns, NAMES, strict=True):
            for stage, (how, percent) in column.items():
                names, (wanted, _) = served.get(stage, []), START[column_name].get(stage, (NONE, 0))
                value = wanted if wanted in names else NONE
                out[how] = gr.Dropdown(method_choices(stage, names, True), value=value, visible=stage in served)
                out[percent] = gr.Slider(visible=value != NONE)
        return out

    def switched(name: str) -> Iterator[dict[Any, Any]]:
        yield {warning: f"loading {name} ..."}
        try:
            yield {warning: "", **fitting(name)}
        except Exception as error:
            yield {warning: explain(error)}

    def visit(before: bool, *values: Any) -> Iterator[dict[Any, Any]]:
        yield {opened: True}
        if not before:
            yield from switched(values[0])
            if embedded:
                yield run(*values)

    gallery.select(picked, None, chosen_outputs, show_progress="hidden").then(again, inputs, results, **HEAVY)
    upload.upload(uploaded, upload, chosen_outputs)
    suggested.input(lambda text: text, suggested, question, show_progress="hidden").then(
        again, inputs, results, **HEAVY
    )
    model.input(switched, model, [warning, longest, *settings], **HEAVY)
    gr.on([go.click, question.submit], run, inputs, results, **HEAVY)
    for column in columns:
        for how, percent in column.values():
            how.input(lambda name: gr.Slider(visible=name != NONE), how, percent, show_progress="hidden")
    gr.on([c.input for c in settings], again, inputs, results, **HEAVY, show_progress="hidden")
    tab.select(visit, [opened, *inputs], [opened, longest, *results, *settings], **HEAVY, show_progress="minimal")


def _column(name: str, start: dict[str, tuple[str, int]]) -> Controls:
    """A dropdown and a slider per stage."""
    out: Controls = {}
    with gr.Column(min_width=260):
        gr.Markdown(f"**Reduction {name}**")
        for stage, label in STAGES.items():
            method, percent = start.get(stage, (NONE, 20))
            names = list_methods(stage=stage)
            how = method_dropdown(stage, names, method, f"ask-{name}-{stage}", optional=True, label=label)
            there = {"visible": method != NONE}
            slider = keep_slider("Visual tokens kept there, %", percent, f"ask-{name}-{stage}-keep", **there)
            out[stage] = how, slider
    return out
