"""What happens on the ask tab when a visitor does something there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.demo.answers import NAMES, answers, reducers_from
from tokenreduce.demo.ask import EMBEDDED, STAGES, START, answer, examples_of, frames_from
from tokenreduce.demo.common import HEAVY, NONE, clear_at_once, fault, in_turn, method_choices, received, said
from tokenreduce.demo.store import Store
from tokenreduce.measure.kept import sheet
from tokenreduce.measure.plots import visual_layers_plot

__all__ = ["Events"]

Updates = Iterator[dict[Any, Any]]


Controls = dict[str, tuple[gr.Dropdown, gr.Slider]]


@dataclass(frozen=True, eq=False)
class Widgets:
    """What is on the tab; ``frames``, ``video``, ``right`` (questions with their answers) and ``opened`` are what the
    server keeps for a visitor. ``columns`` are the controls of A and B by stage: a method and its budget."""

    model: gr.Dropdown
    gallery: gr.Gallery
    upload: gr.UploadButton
    shown: gr.Image
    warning: gr.HTML
    question: gr.Textbox
    suggested: gr.Dropdown
    columns: list[Controls]
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
        return [self.model, self.frames, self.video, self.right, self.question, self.longest, *self.settings]

    @property
    def answers(self) -> list[Any]:
        """What belongs to one question about one picture, and to no other."""
        return [self.table, *self.kept, self.plot]

    @property
    def asked(self) -> list[Any]:
        """What a new picture changes."""
        return [self.frames, self.video, self.right, self.shown, self.suggested, self.question]

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
        asks = gr.on([on.go.click, on.question.submit], self.run, on.inputs, results, **HEAVY)
        follows = gr.on(
            [c.input for c in [*on.settings, on.longest]], self.again, on.inputs, results, **HEAVY,
            show_progress="minimal", show_progress_on=on.longest,
        )  # fmt: skip
        visits = tab.select(
            self.visited, [on.opened, *on.inputs], [on.opened, on.longest, *results, *on.settings], **HEAVY,
            show_progress="minimal",
        )  # fmt: skip
        new = [on.gallery.select, on.upload.upload, on.suggested.input, on.question.input, on.model.input]
        clear_at_once(new, on.answers, [asks, follows, visits])
        on.gallery.select(self.picked, None, [*results, *on.asked], **quiet).then(
            self.again, on.inputs, results, **HEAVY
        )
        on.upload.upload(self.uploaded, on.upload, [*results, *on.asked])
        on.suggested.input(lambda text: text, on.suggested, on.question, **quiet).then(
            self.again, on.inputs, results, **HEAVY
        )
        on.model.input(self.switched, on.model, [on.longest, *results, *on.settings], **HEAVY)
        for column in on.columns:
            for how, percent in column.values():
                how.input(lambda name: gr.Slider(visible=name != NONE), how, percent, **quiet)

    def run(
        self, name: str, frames: list[Image.Image], video: bool, right: dict[str, str], text: str, longest: float,
        *rest: Any,
    ) -> Updates:  # fmt: skip
        """Put the question, and show three answers. Those before go first where that takes its time."""
        on = self.on
        if name != EMBEDDED:
            yield {on.warning: "", **on.cleared()}
        try:
            several = reducers_from(rest, [*STAGES])
            with (yield from in_turn(self.store.turn, lambda told: {on.warning: said(told), **on.cleared()})):
                made = answer(self.store.copy(name), frames, video, text or "", several, int(longest))
            yield {
                on.warning: "", on.table: answers(made.results, right.get(made.question, ""), made.question),
                **dict(zip(on.kept, made.pictures, strict=True)), on.plot: visual_layers_plot(made.layers),
            }  # fmt: skip
        except Exception as error:
            yield {on.warning: fault(error), **on.cleared()}

    def again(self, name: str, *values: Any) -> Updates:
        """Follow every change at once where a model is small enough; elsewhere, what was answered is no longer it."""
        if name == EMBEDDED:
            yield from self.run(name, *values)
        else:
            yield self.on.cleared()

    def picked(self, event: gr.SelectData) -> dict[Any, Any]:
        example = examples_of()[event.index]
        return self._taken(list(example.frames or (example.image,)), bool(example.frames), dict(example.questions))

    def uploaded(self, path: str) -> dict[Any, Any]:
        try:
            with received(path) as files:
                return self._taken(*frames_from(files[0]), {})
        except Exception as error:
            return {self.on.warning: fault(error), **self.on.cleared()}

    def switched(self, name: str) -> Updates:
        """Another model: only what it can do."""
        on = self.on
        yield {on.warning: said(f"loading {name} ..."), **on.cleared()}
        try:
            yield {on.warning: "", **self._fitting(name)}
        except Exception as error:
            yield {on.warning: fault(error)}

    def visited(self, before: bool, *values: Any) -> Updates:
        """The first visit of the tab loads the model and, where that is quick, answers the first question."""
        yield {self.on.opened: True}
        if not before:
            yield from self.switched(values[0])
            if self.store.languages[0] == EMBEDDED:
                yield from self.run(*values)

    def _taken(self, images: list[Image.Image], video: bool, known: dict[str, str]) -> dict[Any, Any]:
        on, texts = self.on, list(known)
        return {
            on.warning: "", **on.cleared(), on.frames: images, on.video: video, on.right: known,
            on.shown: sheet(images), on.suggested: gr.Dropdown(texts, value=texts[0] if texts else None),
            **({on.question: texts[0]} if texts else {}),
        }  # fmt: skip

    def _fitting(self, name: str) -> dict[Any, Any]:
        """The methods that the page starts with, where this model can do them."""
        served = self.store.methods(name)
        out: dict[Any, Any] = {self.on.longest: 1 if name == EMBEDDED else 24}
        for column, column_name in zip(self.on.columns, NAMES, strict=True):
            for stage, (how, percent) in column.items():
                names, (wanted, _) = served.get(stage, []), START[column_name].get(stage, (NONE, 0))
                value = wanted if wanted in names else NONE
                out[how] = gr.Dropdown(method_choices(stage, names, True), value=value, visible=stage in served)
                out[percent] = gr.Slider(visible=value != NONE)
        return out
