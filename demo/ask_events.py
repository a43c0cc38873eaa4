"""What happens on the ask tab when a visitor does something there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.demo.answers import NAMES, answers, reducers_from
from tokenreduce.demo.ask import (
    EMBEDDED,
    STAGES,
    START,
    Answered,
    about_words,
    answer,
    examples_of,
    frames_from,
    longest_of,
)
from tokenreduce.demo.common import HEAVY, NONE, clear_at_once, fault, in_turn, method_choices, received, said
from tokenreduce.demo.store import Store
from tokenreduce.measure.kept import sheet
from tokenreduce.measure.plots import visual_layers_plot
from tokenreduce.zoo.examples import Example

__all__ = ["Events", "captioned"]

Updates = Iterator[dict[Any, Any]]


Controls = dict[str, tuple[gr.Dropdown, gr.Slider]]


@dataclass(frozen=True, eq=False)
class Widgets:
    """What is on the tab; ``frames``, ``video``, ``right`` (questions with their answers, none of an upload) and
    ``opened`` are what the server keeps for a visitor. ``columns`` are the controls of A and B by stage: a method and
    its budget; they lie in ``lists``, which go where there is a text in ``specs``."""

    model: gr.Dropdown
    gallery: gr.Gallery
    upload: gr.UploadButton
    shown: gr.Image
    warning: gr.HTML
    question: gr.Textbox
    suggested: gr.Dropdown
    columns: list[Controls]
    lists: list[gr.Column]
    specs: list[gr.Textbox]
    longest: gr.Slider
    go: gr.Button
    table: gr.HTML
    kept: list[gr.Image]
    plot: gr.Plot
    frames: gr.State
    video: gr.State
    right: gr.State
    opened: gr.State

    @property
    def settings(self) -> list[Any]:
        """Methods and budgets of both columns."""
        return [control for column in self.columns for pair in column.values() for control in pair]

    @property
    def inputs(self) -> list[Any]:
        """What a run is made from."""
        first = [self.model, self.frames, self.video, self.right, self.question, self.longest]
        return [*first, *self.specs, *self.settings]

    @property
    def answers(self) -> list[Any]:
        """What belongs to one question about one picture, and to no other."""
        return [self.table, *self.kept, self.plot]

    @property
    def asked(self) -> list[Any]:
        """What a new picture changes."""
        return [self.frames, self.video, self.right, self.shown, self.suggested, self.question]

    @property
    def fitted(self) -> list[Any]:
        """What another model changes, with :attr:`asked`."""
        return [self.gallery, self.longest, *self.settings]

    def cleared(self) -> dict[Any, Any]:
        """No answers."""
        return {**dict.fromkeys(self.answers), self.table: ""}


class Events:
    """The wiring of the tab: every method is what one event does, and gives what changes on the page."""

    def __init__(self, store: Store, widgets: Widgets) -> None:
        self.store, self.on = store, widgets

    def connect(self, tab: gr.Tab) -> None:
        """Tie the methods to the page."""
        on, results = self.on, [self.on.warning, *self.on.answers]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        asks = gr.on(
            [on.go.click, on.question.submit, *(s.submit for s in on.specs)], self.run, on.inputs, results, **HEAVY
        )
        follows = gr.on(
            [c.input for c in [*on.settings, on.longest]], self.again, on.inputs, results, **HEAVY,
            show_progress="minimal", show_progress_on=on.longest,
        )  # fmt: skip
        visits = tab.select(
            self.visited, [on.opened, *on.inputs], [on.opened, *results, *on.fitted, *on.asked], **HEAVY,
            show_progress="minimal",
        )  # fmt: skip
        new = [on.gallery.select, on.upload.upload, on.suggested.input, on.question.input, on.model.input]
        new += [spec.input for spec in on.specs]
        clear_at_once(new, on.answers, [asks, follows, visits])
        on.gallery.select(self.picked, on.model, [*results, *on.asked], **quiet).then(
            self.again, on.inputs, results, **HEAVY
        )
        on.upload.upload(self.uploaded, on.upload, [*results, *on.asked])
        on.suggested.input(lambda text: text, on.suggested, on.question, **quiet).then(
            self.again, on.inputs, results, **HEAVY
        )
        on.model.input(
            self.switched, [on.model, on.right], [*results, *on.fitted, *on.asked], **HEAVY
        ).then(self.again, on.inputs, results, **HEAVY)  # fmt: skip
        for spec, lists in zip(on.specs, on.lists, strict=True):
            spec.change(lambda text: gr.Column(visible=not (text or "").strip()), spec, lists, **quiet)
        for column in on.columns:
            for how, percent in column.values():
                how.input(lambda name: gr.Slider(visible=name != NONE), how, percent, **quiet)

    def run(
        self, name: str, frames: list[Image.Image], video: bool, right: dict[str, str], text: str, longest: float,
        *rest: Any,
    ) -> Updates:  # fmt: skip
        """Put the question, and show three answers. Those before go first where that takes its time."""
        on = self.on
        if name not in EMBEDDED:
            yield {on.warning: "", **on.cleared()}
        try:
            several = reducers_from(rest[len(NAMES) :], [*STAGES], rest[: len(NAMES)])
            with (yield from in_turn(self.store.turn, lambda told: {on.warning: said(told), **on.cleared()})):
                made = answer(self.store.copy(name), frames, video, text or "", several, int(longest))
            yield {
                on.warning: "", on.table: self._answers(made, right),
                **dict(zip(on.kept, made.pictures, strict=True)), on.plot: visual_layers_plot(made.layers),
            }  # fmt: skip
        except Exception as error:
            yield {on.warning: fault(error), **on.cleared()}

    def again(self, name: str, *values: Any) -> Updates:
        """Follow every change at once where a model is small enough; elsewhere, what was answered is no longer it."""
        if name in EMBEDDED:
            yield from self.run(name, *values)
        else:
            yield self.on.cleared()

    def picked(self, event: gr.SelectData, name: str) -> dict[Any, Any]:
        return self._example(examples_of(name)[event.index])

    def uploaded(self, path: str) -> dict[Any, Any]:
        try:
            with received(path) as files:
                return self._taken(*frames_from(files[0]), {})
        except Exception as error:
            return {self.on.warning: fault(error), **self.on.cleared()}

    def switched(self, name: str, right: dict[str, str]) -> Updates:
        """Another model: only what it can do, and its own examples; an upload stays."""
        on = self.on
        yield {on.warning: said(f"loading {name} ..."), **on.cleared()}
        try:
            first = examples_of(name)[0]
            made = {on.warning: "", **self._fitting(name), **(self._example(first) if right else {})}
            asked: dict[str, Any] = {"value": first.questions[0][0]} if right else {}
            yield {**made, on.question: gr.Textbox(**asked, info=about_words(name))}
        except Exception as error:
            yield {on.warning: fault(error)}

    def visited(self, before: bool, *values: Any) -> Updates:
        """The first visit of the tab loads the model and, where that is quick, answers the first question."""
        on = self.on
        yield {on.opened: True}
        if not before:
            for made in self.switched(values[0], {}):
                yield {k: v for k, v in made.items() if k is not on.gallery}
            if self.store.languages[0] in EMBEDDED:
                yield from self.run(*values)

    def _answers(self, made: Answered, right: dict[str, str]) -> str:
        return answers(made.results, right.get(made.question, ""), made.question, made.notes)

    def _example(self, example: Example) -> dict[Any, Any]:
        return self._taken(list(example.frames or (example.image,)), bool(example.frames), dict(example.questions))

    def _taken(self, images: list[Image.Image], video: bool, known: dict[str, str]) -> dict[Any, Any]:
        on, texts = self.on, list(known)
        return {
            on.warning: "", **on.cleared(), on.frames: images, on.video: video, on.right: known,
            on.shown: sheet(images),
            on.suggested: gr.Dropdown(texts, value=texts[0] if texts else None, visible=bool(texts)),
            on.question: gr.Textbox(texts[0]) if texts else gr.Textbox(),
        }  # fmt: skip

    def _fitting(self, name: str) -> dict[Any, Any]:
        """The methods that the page starts with, where this model can do them."""
        served = self.store.methods(name)
        out: dict[Any, Any] = {
            self.on.longest: longest_of(name),
            self.on.gallery: gr.Gallery(captioned(examples_of(name)), selected_index=None),
        }  # fmt: skip
        for column, column_name in zip(self.on.columns, NAMES, strict=True):
            for stage, (how, percent) in column.items():
                names, (wanted, _) = served.get(stage, []), START[column_name].get(stage, (NONE, 0))
                value = wanted if wanted in names else NONE
                out[how] = gr.Dropdown(method_choices(stage, names, True), value=value, visible=stage in served)
                out[percent] = gr.Slider(visible=value != NONE)
        return out


def captioned(examples: Sequence[Example]) -> list[tuple[Image.Image, str]]:
    """Examples as a gallery shows them."""
    return [(e.image, "clip" if e.frames else "") for e in examples]
