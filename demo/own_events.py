"""What happens on the tab "Your model" when a visitor does something there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.bench.unlabelled import Named
from tokenreduce.demo.common import clear_at_once, fault, received, said
from tokenreduce.demo.image import enlarged
from tokenreduce.demo.own import about, examples_of, named, pictures_from, question_of, task_for
from tokenreduce.demo.sweep_events import SweepEvents, SweepWidgets, Updates
from tokenreduce.demo.trade import check_choice, methods_of
from tokenreduce.demo.trade_events import first_methods

__all__ = ["FIRST", "Events", "Widgets", "thumbnails"]

FIRST = "Choose methods and press Run: the unreduced model answers first, then rows come one by one."


@dataclass(frozen=True, eq=False)
class Widgets(SweepWidgets):
    """What is on the tab beside the sweep; ``mine`` (the visitor's pictures) and ``opened`` are what the server keeps
    for a visitor."""

    model: gr.Dropdown
    gallery: gr.Gallery
    about: gr.HTML
    upload: gr.UploadButton
    back: gr.Button
    question: gr.Textbox
    methods: gr.Dropdown
    budgets: gr.CheckboxGroup
    inputs: gr.Slider
    mine: gr.State
    opened: gr.State

    @property
    def settings(self) -> list[Any]:
        return [self.model, self.methods, self.budgets, self.inputs, self.question]

    @property
    def still(self) -> list[Any]:
        return [*super().still, self.upload, self.back]

    @property
    def pictures(self) -> list[Any]:
        """What other pictures change."""
        return [self.mine, self.gallery, self.about, self.back]


class Events(SweepEvents):
    """The wiring of the tab: every method is what one event does, and gives what changes on the page."""

    on: Widgets

    def connect(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Tie the methods to the page."""
        on = self.on
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        fitted = [on.warning, on.state, on.methods]
        visit = tab.select(self.visited, [on.opened, on.model], [on.opened, *fitted], **quiet)
        self.connect_sweep(page, self.start, [*on.settings, on.mine, on.against])
        clear_at_once([on.model.input, on.back.click], [on.plot])  # not an upload's, which may be broken
        clear_at_once([on.model.input], [], [visit])  # whose methods must not come behind those of another model
        on.model.input(self.switched, [on.model, on.mine], [*on.shown, *on.pictures], **quiet)
        gone = [on.held, on.plot, on.table, on.as_csv, on.as_html]
        on.upload.upload(self.uploaded, on.upload, [on.warning, on.state, *gone, *on.pictures], **quiet)
        on.back.click(self.returned, on.model, [on.warning, on.state, *gone, *on.pictures], **quiet)

    def start(
        self, model: str, wanted: list[str], shares: list[str], n: float, request: gr.Request, *rest: Any
    ) -> Updates:
        """Run a sweep, or wait for those of others, and show it row by row."""
        on, (question, mine, axis) = self.on, rest
        yield {on.warning: "", on.state: said("loading the model ..."), **on.cleared(), **on.busy(True)}
        try:
            check_choice(wanted, shares)
            pictures = (mine or named(examples_of(self.sweeps.store, model)))[: int(n)]
            task = task_for(self.sweeps.store, model, pictures, question or "")
            yield from self.followed(self.sweeps.follow(str(request.session_hash), task, wanted, shares), axis)
        except Exception as error:
            yield self.failed(error)

    def uploaded(self, paths: list[str]) -> dict[Any, Any]:
        """Pictures of the visitor in place of those before, which stay where one of them is broken."""
        on = self.on
        try:
            with received(paths) as files:
                pictures = pictures_from(files)
        except Exception as error:
            return {on.warning: fault(error)}
        return {on.warning: "", on.state: said(FIRST), **on.cleared(), **self._shown(pictures, True)}

    def returned(self, model: str) -> dict[Any, Any]:
        """The examples again."""
        on = self.on
        pictures = named(examples_of(self.sweeps.store, model))
        return {on.warning: "", on.state: said(FIRST), **on.cleared(), **self._shown(pictures, False)}

    def switched(self, model: str, mine: list[Named] | None) -> Updates:
        """Another model: its methods, its question and its pictures, unless the visitor brought some."""
        on, store = self.on, self.sweeps.store
        asks = gr.Textbox(question_of(model), visible=model in store.languages)
        yield {on.warning: "", on.state: said("loading the model ..."), **on.cleared(), on.question: asks}
        try:
            shown = {} if mine else self._shown(named(examples_of(store, model)), False)
            yield {**self._fitting(model), **shown}
        except Exception as error:
            yield {on.warning: fault(error), on.state: "", on.methods: gr.Dropdown([], value=[])}

    def visited(self, before: bool, model: str) -> Updates:
        """The first visit loads the model, to see what it can do."""
        on = self.on
        yield {on.opened: True}
        if before:
            return
        try:
            yield {on.state: said("loading the model ...")}
            yield self._fitting(model)
        except Exception as error:
            yield {on.warning: fault(error), on.state: ""}

    def _fitting(self, model: str) -> dict[Any, Any]:
        names = methods_of(self.sweeps.store, model)
        return {self.on.state: said(FIRST), self.on.methods: gr.Dropdown(names, value=first_methods(names))}

    def _shown(self, pictures: list[Named], uploaded: bool) -> dict[Any, Any]:
        on = self.on
        return {
            on.mine: pictures if uploaded else None, on.about: said(about(pictures, uploaded)),
            on.gallery: thumbnails(pictures), on.back: gr.Button(visible=uploaded),
        }  # fmt: skip


def thumbnails(pictures: list[Named]) -> list[Image.Image]:
    """Small copies for a gallery."""
    out = []
    for picture in pictures:
        small = enlarged(picture.image, 84).copy()
        small.thumbnail((160, 160))
        out.append(small)
    return out
