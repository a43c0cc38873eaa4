"""The image tab: one picture through one model, without and with a reduction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.bench.columns import seconds
from tokenreduce.bench.models import Loaded
from tokenreduce.demo.common import (
    HEAVY,
    chosen,
    explain,
    keep_slider,
    message,
    method_choices,
    method_dropdown,
    models,
    received,
)
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import IMAGES, image_from
from tokenreduce.measure.image import ImageComparison, clock_image, compare_image
from tokenreduce.measure.plots import image_layers_plot
from tokenreduce.zoo.examples import Example, digit_examples, scene_examples

__all__ = ["add", "facts", "probabilities"]

#: Models whose classes do not exclude each other: their outputs are probabilities one by one.
SEVERAL = ("world-vit",)
START = "tome", 35


def examples_of(model: str) -> tuple[Example, ...]:
    """Pictures to try ``model`` on."""
    return digit_examples(6) if model == "digits-vit" else scene_examples(6)


def probabilities(loaded: Loaded, outputs: Any, most: int = 5) -> dict[str, float] | None:
    """The likeliest classes, None for a model without classes."""
    if loaded.kind == "features" or (loaded.kind == "zero-shot" and loaded.classifier is None):
        return None
    shares = outputs.sigmoid() if loaded.name in SEVERAL else outputs.softmax(-1)
    best = shares.topk(min(most, len(shares)))
    names = loaded.labels or [f"class {i}" for i in range(len(shares))]
    return {names[i]: float(p) for p, i in zip(best.values, best.indices.tolist(), strict=True)}


def facts(comparison: ImageComparison, clock: tuple[Any, Any] | None, batch: int) -> str:
    """Tokens, FLOPs and time as a table."""
    a, b = comparison.stock, comparison.reduced
    rows = [
        (
            "tokens after the last layer",
            f"{a.tokens[-1]}",
            f"{b.tokens[-1]}",
            f"{a.tokens[-1] / b.tokens[-1]:.2f}x fewer",
        ),
        ("FLOPs of one image", _flops(a.flops), _flops(b.flops), f"{100 * b.flops / a.flops:.1f} %"),
    ]
    name = f"time for {batch} images"
    if clock is None:
        rows.append((name, "measuring", "measuring", ""))
    else:
        ratio = clock[0].ratio(clock[1])
        said = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        rows.append((name, seconds(clock[0].median), seconds(clock[1].median), said))
    rows.append(("likeness of the outputs (cosine)", "", "", f"{comparison.similarity:.3f}"))
    lines = ["| | unreduced | reduced | |", "|:--|--:|--:|--:|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, "", *(f"Note: {note}" for note in comparison.notes)])


def _flops(value: float) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def add(store: Store, page: gr.Blocks) -> None:
    """Build the tab inside ``page``."""
    first = store.images[0]
    picture, seen = gr.State(None, time_to_live=3600), gr.State(None, time_to_live=3600)
    truth = gr.State("")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(
                models(store.images), value=first, label="Model", elem_id="image-model", filterable=False
            )
            method = method_dropdown(
                "encoder", store.methods(first)["encoder"], START[0], "image-method", label="Method"
            )
            keep = keep_slider("Patch tokens left after the last layer, %", START[1], "image-keep")
            batch = gr.Dropdown(
                [1, 8, 32], value=8, label="Images per timed forward", elem_id="image-batch", filterable=False
            )
            gr.Markdown("Examples, held out from training:", elem_classes="hint")
            gallery = gr.Gallery(
                _thumbnails(first), show_label=False, columns=3, height=235, allow_preview=False, object_fit="contain",
                elem_id="image-examples", elem_classes="gallery-examples", buttons=[], interactive=False,
            )  # fmt: skip
            upload = gr.UploadButton(
                "Upload an image", file_types=list(IMAGES), elem_id="image-upload", type="filepath", size="sm"
            )
        with gr.Column(scale=5, min_width=300):
            warning = message("image-message")
            with gr.Row():
                with gr.Column(min_width=230):
                    before = gr.Image(label="What the model sees", elem_id="image-before", **_look())
                with gr.Column(min_width=230):
                    after = gr.Image(label="Tokens that are left", elem_id="image-after", **_look())
            layer = gr.Slider(1, 6, value=6, step=1, label="Picture after layer", elem_id="image-layer")
            caption = gr.Markdown(elem_id="image-caption")
            gr.Markdown(
                "A patch alone in its token keeps its pixels; merged patches show their mean colour with a line of one "
                "colour around them; dropped patches are dark.", elem_classes="hint",
            )  # fmt: skip
            with gr.Row():
                label_a = gr.Label(label="Prediction, unreduced", elem_id="image-stock", min_width=200)
                label_b = gr.Label(label="Prediction, reduced", elem_id="image-reduced", min_width=200)
            table = gr.Markdown(elem_id="image-facts", elem_classes="facts")
            plot = gr.Plot(show_label=False, elem_id="image-plot")

    controls = [model, picture, truth, method, keep, layer, batch]
    shown = [warning, picture, truth, seen, before, after, label_a, label_b, layer, caption, table, plot]

    def draw(made: ImageComparison | None, at: float, right: str) -> dict[Any, Any]:
        if made is None:
            return {caption: "Nothing was computed yet."}
        at = min(int(at), made.look.depth)
        said = f"After layer {at}: {made.look.caption(at - 1)}." + (f" In the picture: {right}." if right else "")
        return {after: made.look.overlay(at - 1, side=320), caption: said}

    def run(name: str, image: Image.Image | None, right: str, how: str, percent: float, at: float, n: int) -> Any:
        try:
            if image is None:
                example = examples_of(name)[0]
                image, right = example.image, example.truth
            loaded = store.image(name)
            with store.turn:
                made = compare_image(loaded, image, chosen("encoder", how, percent))
        except Exception as error:
            yield {warning: explain(error)}
            return
        depth = made.look.depth
        at = min(int(at), depth)
        classes = [probabilities(loaded, side.outputs) for side in (made.stock, made.reduced)]
        yield {
            warning: "", picture: image, truth: right, seen: made, before: _enlarged(made.look.image),
            label_a: _label(classes[0], name), label_b: _label(classes[1], name),
            layer: gr.Slider(maximum=depth, value=at), table: facts(made, None, int(n)),
            plot: image_layers_plot(made), **draw(made, at, right),
        }  # fmt: skip
        try:
            with store.turn:
                clock = clock_image(loaded, image, made.reducers, batch=int(n))
        except Exception as error:
            yield {warning: explain(error)}
            return
        yield {table: facts(made, clock, int(n))}

    def uploaded(path: str, name: str, *rest: Any) -> Iterator[dict[Any, Any]]:
        try:
            with received(path) as files:
                image = image_from(files[0])
        except Exception as error:
            yield {warning: explain(error)}
            return
        yield from run(name, image, "", *rest[2:])

    def picked(event: gr.SelectData, name: str, *rest: Any) -> Iterator[dict[Any, Any]]:
        example = examples_of(name)[event.index]
        yield from run(name, example.image, example.truth, *rest[2:])

    def switched(name: str, _: Any, __: Any, how: str, percent: float, at: float, n: int) -> Iterator[dict[Any, Any]]:
        yield {warning: f"loading {name} ..."}
        try:
            names = store.methods(name)["encoder"]
        except Exception as error:
            yield {warning: explain(error)}
            return
        how = how if how in names else START[0] if START[0] in names else names[0]
        yield {method: gr.Dropdown(method_choices("encoder", names), value=how), gallery: _thumbnails(name)}
        yield from run(name, None, "", how, percent, 1 << 10, n)

    gr.on([method.input, keep.input, batch.input], run, controls, shown, **HEAVY, show_progress="hidden")
    page.load(run, controls, shown, **HEAVY, show_progress="minimal")
    upload.upload(uploaded, [upload, *controls], shown, **HEAVY)
    gallery.select(picked, controls, shown, **HEAVY, show_progress="hidden")
    model.input(switched, controls, [*shown, method, gallery], **HEAVY)
    layer.input(draw, [seen, layer, truth], [after, caption], show_progress="hidden", trigger_mode="always_last")


def _label(shares: dict[str, float] | None, model: str) -> gr.Label:
    """The best class stands in large letters, unless there may be several."""
    return gr.Label(shares, visible=shares is not None, show_heading=model not in SEVERAL)


def _look() -> dict[str, Any]:
    return {"interactive": False, "type": "pil", "buttons": ["fullscreen", "download"], "height": 300, "format": "png"}


def _thumbnails(model: str) -> list[tuple[Image.Image, str]]:
    return [(_enlarged(e.image, 84), e.truth if len(e.truth) < 4 else "") for e in examples_of(model)]


def _enlarged(image: Image.Image, least: int = 320) -> Image.Image:
    factor = max(1, -(-least // min(image.size)))
    how = Image.Resampling.NEAREST if min(image.size) <= 112 else Image.Resampling.BICUBIC
    return image.resize((image.width * factor, image.height * factor), how) if factor > 1 else image
