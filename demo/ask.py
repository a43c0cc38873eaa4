"""The ask tab: one question about an image or a video, answered whole and with two reductions side by side."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.bench.columns import in_bytes, seconds
from tokenreduce.demo.common import (
    HEAVY,
    chosen,
    explain,
    keep_slider,
    message,
    method_choices,
    method_dropdown,
    received,
)
from tokenreduce.demo.store import Store
from tokenreduce.measure.frames import ask_frames
from tokenreduce.measure.generation import Comparison, Side, compare_several
from tokenreduce.measure.kept import kept_views, places
from tokenreduce.measure.plots import visual_layers_plot
from tokenreduce.measure.question import ask
from tokenreduce.reducer import Reducer
from tokenreduce.uploads import IMAGES, VIDEOS, image_from, is_video, video_from
from tokenreduce.zoo.examples import Example, clip_examples, scene_examples

__all__ = ["add", "answers", "missing", "put"]

STAGES = {
    "encoder": "Inside the vision encoder",
    "projector": "Before the language model",
    "language": "Inside the language model",
}
#: What the two columns start with: method by stage, and the share of tokens that it keeps in percent.
START = (
    ("A", {"projector": ("visionzip", 20)}),
    ("B", {"language": ("fastv", 20)}),
)
FRAMES, LONGEST_QUESTION, ROUNDS = 8, 400, 3
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
    return (*scene_examples(6), *clip_examples(2))


def put(loaded: Any, frames: Sequence[Image.Image], video: bool, text: str) -> tuple[Any, Any]:
    """The question as the model takes it, and where its visual tokens lie. Raises ``ValueError`` for an empty or too
    long one and what the processor refuses."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("the question is empty; ask something about the picture")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(text)} characters; at most {LONGEST_QUESTION} are read")
    if not frames:
        raise ValueError("there is no picture yet; choose an example or upload one")
    if video:
        return ask_frames(loaded, frames, text)
    # The embedded model knows no chat form: image and question are all it was trained on.
    prompt = f"{loaded.processor.image_token} {text}" if loaded.name == "world-llava" else text
    question = ask(loaded.processor, frames, prompt)
    return question, places(loaded.model, loaded.processor, question)


def answers(results: Sequence[Comparison], truth: str = "") -> str:
    """Answers and numbers side by side, as an HTML table: unreduced, then each of ``results``."""
    heads = ["", "unreduced", *(f"{name}: {r.spec}" for (name, _), r in zip(START, results, strict=False))]
    sides: list[Side] = [results[0].stock, *(r.reduced for r in results)]
    ratios = [None, *(r.ratios() for r in results)]

    def row(name: str, key: str, values: Sequence[str]) -> list[str]:
        cells = [values[0]]
        for value, ratio in zip(values[1:], ratios[1:], strict=True):
            times = ratio[key] if ratio else None
            cells.append(value + (f" ({times:.2f}x)" if times is not None else ""))
        return [name, *cells]

    said = ["answer", *(s.answer or "(nothing)" for s in sides)]
    same = ["same tokens as unreduced", "", *("yes" if r.agree else "no" for r in results)]
    rows = [
        said, same,
        row("visual tokens at the entry", "entry_tokens", [f"{s.layers[0]:,}" for s in sides]),
        row(f"visual tokens, mean of {len(sides[0].layers)} layers", "mean_layer_tokens",
            [f"{s.mean_tokens:,.1f}" for s in sides]),
        row("time to the first token", "first_token_s", [seconds(s.first.median) for s in sides]),
        row("KV cache", "cache_bytes", [in_bytes(s.cache) for s in sides]),
    ]  # fmt: skip
    if truth:
        rows.insert(1, ["right answer", truth, *("" for _ in results)])
    body = "".join(
        f'<tr class="r{i}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for i, line in enumerate(rows)
    )
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    notes = "".join(f"<p>Note: {html.escape(n)}</p>" for n in dict.fromkeys(n for r in results for n in r.notes))
    said_how = "In brackets: how many times fewer or faster. Times are medians of interleaved rounds."
    return (
        f'<div class="wide"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="small">{said_how}</p>{notes}'
    )


def add(store: Store, page: gr.Blocks) -> None:
    """Build the tab."""
    if not store.languages:
        gr.Markdown(missing(), elem_id="ask-missing")
        return
    first = store.languages[0]
    embedded = first == "world-llava"
    frames, video, right = gr.State([], time_to_live=3600), gr.State(False), gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(store.languages, value=first, label="Model", elem_id="ask-model", filterable=False)
            gallery = gr.Gallery(
                [(e.image, "clip" if e.frames else "") for e in examples_of()], columns=4, height=170,
                label="Examples: pictures and clips (held out)", allow_preview=False, object_fit="contain",
                elem_id="ask-examples", buttons=[], interactive=False,
            )  # fmt: skip
            upload = gr.UploadButton(
                "Upload an image or a video",
                file_types=[*IMAGES, *VIDEOS],
                elem_id="ask-upload",
                type="filepath",
                size="sm",
            )
            shown = gr.Gallery(
                label="The model is asked about", columns=4, height=170, allow_preview=False, object_fit="contain",
                elem_id="ask-shown", buttons=[], interactive=False,
            )  # fmt: skip
        with gr.Column(scale=5, min_width=300):
            warning = message("ask-message")
            question = gr.Textbox(
                label="Question", elem_id="ask-question", max_length=4 * LONGEST_QUESTION, submit_btn=False,
                placeholder="what color is the star" if embedded else "What is in this picture?",
                info="world-llava knows the words of its small world only, see the suggestions" if embedded else None,
            )  # fmt: skip
            suggested = gr.Dropdown(
                [], label="Suggestions for this picture", elem_id="ask-suggested", value=None, visible=embedded
            )
            with gr.Row():
                columns = [_column(name, start, store.methods(first)) for name, start in START]
            with gr.Row():
                longest = gr.Slider(
                    1, 64, value=2 if embedded else 24, step=1, label="Longest answer, tokens", elem_id="ask-longest"
                )
                go = gr.Button("Ask", variant="primary", elem_id="ask-go")
            table = gr.HTML(elem_id="ask-answers")
            with gr.Row():
                kept = [
                    gr.Gallery(
                        label=f"{name}: tokens left at the end", columns=2, height=330, object_fit="contain",
                        elem_id=f"ask-kept-{name}", buttons=["fullscreen"], interactive=False, format="png",
                    )
                    for name, _ in START
                ]  # fmt: skip
            plot = gr.Plot(label="Layer by layer", elem_id="ask-plot")

    settings = [control for column in columns for pair in column.values() for control in pair]
    inputs = [model, frames, video, right, question, longest, *settings]
    results = [warning, table, *kept, plot]
    chosen_outputs = [warning, frames, video, right, shown, suggested, question]

    def run(
        name: str, seen: list[Image.Image], is_clip: bool, known: dict[str, str], text: str, most: float, *rest: Any
    ) -> Any:
        try:
            several = _reducers(rest, [*columns[0]])
            with store.turn:
                loaded = store.copy(name)
                asked, where = put(loaded, seen, is_clip, text or "")
                made = compare_several(
                    loaded.model, loaded.processor, asked, several, max_new_tokens=int(most), rounds=ROUNDS
                )
            sides = {"unreduced": made[0].stock.layers}
            sides |= {f"{n}: {r.spec}": r.reduced.layers for (n, _), r in zip(START, made, strict=True)}
            return {
                warning: "", table: answers(made, known.get(" ".join(text.split()), "")),
                **{g: kept_views(r, where) for g, r in zip(kept, made, strict=True)}, plot: visual_layers_plot(sides),
            }  # fmt: skip
        except Exception as error:
            return {warning: explain(error)}

    def take(images: list[Image.Image], is_clip: bool, known: dict[str, str]) -> dict[Any, Any]:
        texts = list(known)
        return {
            warning: "", frames: images, video: is_clip, right: known, shown: images,
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

    def start() -> dict[Any, Any]:
        example = examples_of()[0]
        return take([example.image], False, dict(example.questions))

    def switched(name: str) -> Iterator[dict[Any, Any]]:
        yield {warning: f"loading {name} ..."}
        try:
            served = store.methods(name)
        except Exception as error:
            yield {warning: explain(error)}
            return
        out: dict[Any, Any] = {warning: ""}
        for column in columns:
            for stage, (how, percent) in column.items():
                out[how] = gr.Dropdown(
                    method_choices(stage, served.get(stage, []), True), value="none", visible=stage in served
                )
                out[percent] = gr.Slider(visible=stage in served)
        yield out

    gallery.select(picked, None, chosen_outputs, show_progress="hidden").then(run, inputs, results, **HEAVY)
    upload.upload(uploaded, upload, chosen_outputs)
    suggested.input(lambda text: text, suggested, question, show_progress="hidden").then(run, inputs, results, **HEAVY)
    model.input(switched, model, [warning, *settings], **HEAVY)
    gr.on([go.click, question.submit], run, inputs, results, **HEAVY)
    gr.on([c.input for c in settings], run, inputs, results, **HEAVY, show_progress="hidden")
    loading = page.load(start, None, chosen_outputs)
    if embedded:
        loading.then(run, inputs, results, **HEAVY)


def _column(name: str, start: dict[str, tuple[str, int]], served: dict[str, list[str]]) -> Controls:
    """A dropdown and a slider per stage that the model has."""
    out: Controls = {}
    with gr.Column(min_width=260):
        gr.Markdown(f"**Reduction {name}**")
        for stage, label in STAGES.items():
            method, percent = start.get(stage, ("none", 20))
            names = served.get(stage, [])
            there = {"visible": stage in served}
            how = method_dropdown(stage, names, method, f"ask-{name}-{stage}", optional=True, label=label, **there)
            slider = keep_slider("Visual tokens kept there, %", percent, f"ask-{name}-{stage}-keep", **there)
            out[stage] = how, slider
    return out


def _reducers(values: Sequence[Any], stages: Sequence[str]) -> list[tuple[Reducer, ...]]:
    """The reducers of each column from the values of all its controls."""
    each = 2 * len(stages)
    out = []
    for at, (name, _) in enumerate(START):
        mine = values[at * each : (at + 1) * each]
        made = [r for i, stage in enumerate(stages) for r in chosen(stage, mine[2 * i], mine[2 * i + 1])]
        if not made:
            raise ValueError(f"reduction {name} names no method; choose one")
        out.append(tuple(made))
    return out
