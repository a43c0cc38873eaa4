"""What happens on the tab Measure when a visitor does something there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from tokenreduce.demo.common import clear_at_once, fault, received, said
from tokenreduce.demo.sweep_events import SweepEvents, SweepWidgets, Updates
from tokenreduce.demo.trade import files_of, methods_of, title_of

__all__ = ["FIRST", "Events", "Widgets", "first_methods"]

FIRST = "Choose methods and press Run: the plot grows row by row."


@dataclass(frozen=True, eq=False)
class Widgets(SweepWidgets):
    """What is on the tab beside the sweep; ``opened`` is what the server keeps for a visitor."""

    bench: gr.Dropdown
    methods: gr.Dropdown
    budgets: gr.CheckboxGroup
    inputs: gr.Slider
    earlier: gr.UploadButton
    opened: gr.State

    @property
    def settings(self) -> list[Any]:
        return [self.bench, self.methods, self.budgets, self.inputs]

    @property
    def still(self) -> list[Any]:
        return [*super().still, self.earlier]


def first_methods(names: Sequence[str]) -> list[str]:
    """Those that are chosen when a benchmark is."""
    return [name for name in ("tome", "evit", "visionzip", "fastv") if name in names]


class Events(SweepEvents):
    """The wiring of the tab: every method is what one event does, and gives what changes on the page."""

    on: Widgets

    def connect(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Tie the methods to the page."""
        on = self.on
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        visit = tab.select(self.visited, [on.opened, on.bench], [on.opened, on.warning, on.state, on.methods], **quiet)
        self.connect_sweep(page, self.start, [*on.settings, on.against])
        clear_at_once([on.bench.input, on.earlier.upload], [on.plot])
        clear_at_once([on.bench.input], [], [visit])  # whose methods must not come behind those of another benchmark
        on.bench.input(self.switched, on.bench, on.shown, **quiet)
        on.earlier.upload(self.load, [on.earlier, on.against], on.shown, **quiet)

    def start(
        self, what: str, wanted: list[str], shares: list[str], n: float, axis: str, request: gr.Request
    ) -> Updates:
        """Run a sweep, or wait for those of others, and show it row by row."""
        on = self.on
        yield {on.warning: "", on.state: said("loading model and data ..."), **on.cleared(), **on.busy(True)}
        try:
            visitor = str(request.session_hash)
            yield from self.followed(self.sweeps.run(visitor, what, wanted, shares, int(n)), axis)
        except Exception as error:
            yield self.failed(error)

    def load(self, paths: list[str], axis: str, request: gr.Request) -> dict[Any, Any]:
        """An earlier run in place of what is shown."""
        on = self.on
        try:
            with received(paths) as files:
                run = self.sweeps.earlier(str(request.session_hash), files)
            told = {on.warning: "", on.state: said(title_of(run))}
            return {**told, **self.show(run, axis, files_of(run, run.folder))}
        except Exception as error:
            return {on.warning: fault(error), on.state: "", **on.cleared()}

    def switched(self, what: str) -> Updates:
        """Another benchmark: its methods, and nothing of the one before."""
        on = self.on
        yield {on.warning: "", on.state: said("loading the model ..."), **on.cleared()}
        try:
            names = methods_of(self.sweeps.store, self.sweeps.known[what])
            yield {on.state: "", on.methods: gr.Dropdown(names, value=first_methods(names))}
        except Exception as error:
            yield {on.warning: fault(error), on.state: "", on.methods: gr.Dropdown([], value=[])}

    def visited(self, before: bool, what: str | None) -> Updates:
        """The first visit loads the model, to see what it can do."""
        on = self.on
        yield {on.opened: True}
        if before or what is None:
            return
        try:
            yield {on.state: said("loading the model ...")}
            names = methods_of(self.sweeps.store, self.sweeps.known[what])
            yield {on.state: said(FIRST), on.methods: gr.Dropdown(names, value=first_methods(names))}
        except Exception as error:
            yield {on.warning: fault(error), on.state: ""}
