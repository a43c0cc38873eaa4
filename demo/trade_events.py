"""What happens on the tab Measure when a visitor does something there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.bench.runs import Run
from tokenreduce.demo.common import clear_at_once, fault, received, said
from tokenreduce.demo.trade import WAITING, Sweeps, drawn, files_of, methods_of, rows_of, said_of, title_of

__all__ = ["FIRST", "Events", "first_methods"]

Updates = Iterator[dict[Any, Any]]

FIRST = "Choose methods and press Run: the plot grows row by row."


@dataclass(frozen=True, eq=False)
class Widgets:
    """What is on the tab; ``held`` (the run that is shown) and ``opened`` are what the server keeps for a
    visitor."""

    bench: gr.Dropdown
    methods: gr.Dropdown
    budgets: gr.CheckboxGroup
    inputs: gr.Slider
    go: gr.Button
    stop: gr.Button
    earlier: gr.UploadButton
    warning: gr.HTML
    state: gr.HTML
    against: gr.Radio
    plot: gr.Plot
    as_csv: gr.DownloadButton
    as_html: gr.DownloadButton
    table: gr.Dataframe
    held: gr.State
    opened: gr.State

    @property
    def settings(self) -> list[Any]:
        """What a sweep is made from; they stand still while one runs."""
        return [self.bench, self.methods, self.budgets, self.inputs]

    @property
    def shown(self) -> list[Any]:
        """Everything that a run may change."""
        files = [self.as_csv, self.as_html]
        return [
            self.warning, self.state, self.held, self.plot, self.table, *files, self.go, self.stop, self.earlier,
            *self.settings,
        ]  # fmt: skip

    def cleared(self) -> dict[Any, Any]:
        """No run."""
        gone = {b: gr.DownloadButton(value=None, interactive=False) for b in (self.as_csv, self.as_html)}
        return {self.held: None, self.plot: None, self.table: gr.Dataframe(None, visible=False), **gone}

    def busy(self, now: bool) -> dict[Any, Any]:
        """Whether a sweep of this visitor runs or waits."""
        free = {kind: gr.update(interactive=not now) for kind in (*self.settings, self.go, self.earlier)}
        return {**free, self.stop: gr.Button(interactive=now)}


def first_methods(names: Sequence[str]) -> list[str]:
    """Those that are chosen when a benchmark is."""
    return [name for name in ("tome", "evit", "visionzip", "fastv") if name in names]


class Events:
    """The wiring of the tab: every method is what one event does, and gives what changes on the page."""

    def __init__(self, sweeps: Sweeps, widgets: Widgets) -> None:
        self.sweeps, self.on = sweeps, widgets

    def connect(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Tie the methods to the page."""
        on = self.on
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        # Sweeps line up behind each other in `Sweeps`, which tells them their place; Gradio's own line would not.
        visit = tab.select(self.visited, [on.opened, on.bench], [on.opened, on.warning, on.state, on.methods], **quiet)
        on.go.click(
            self.start, [*on.settings, on.against], on.shown, concurrency_id="sweep", concurrency_limit=WAITING, **quiet
        )
        # The word first: what the sweep says when it has stopped must come behind it.
        on.stop.click(self.stopping, None, [on.state, on.stop], **quiet).then(self.halt, None, None, **quiet)
        clear_at_once([on.bench.input, on.earlier.upload], [on.plot])
        clear_at_once([on.bench.input], [], [visit])  # whose methods must not come behind those of another benchmark
        on.bench.input(self.switched, on.bench, on.shown, **quiet)
        on.against.input(self.turned, [on.held, on.against], [on.warning, on.plot], **quiet)
        on.earlier.upload(self.load, [on.earlier, on.against], on.shown, **quiet)
        page.unload(self.left)

    def start(
        self, what: str, wanted: list[str], shares: list[str], n: float, axis: str, request: gr.Request
    ) -> Updates:
        """Run a sweep, or wait for those of others, and show it row by row."""
        on = self.on
        yield {on.warning: "", on.state: said("loading model and data ..."), **on.cleared(), **on.busy(True)}
        try:
            for progress, out in self.sweeps.run(str(request.session_hash), what, wanted, shares, int(n)):
                ended = progress.state in ("done", "stopped")
                run, idle = progress.run, on.busy(False) if ended else {}
                files = files_of(run, out) if ended and run else None
                yield {on.state: said(said_of(progress)), **idle, **(self._shown(run, axis, files) if run else {})}
        except Exception as error:
            yield {on.warning: fault(error), on.state: "", **on.cleared(), **on.busy(False)}

    def stopping(self, request: gr.Request) -> dict[Any, Any]:
        on = self.on
        if not self.sweeps.runs(str(request.session_hash)):
            return {on.state: gr.update()}  # it ended just now, and has said so
        told = said("stopping; a row that is being measured ends first ...")
        return {on.state: told, on.stop: gr.Button(interactive=False)}

    def halt(self, request: gr.Request) -> None:
        self.sweeps.stop(str(request.session_hash))

    def load(self, paths: list[str], axis: str, request: gr.Request) -> dict[Any, Any]:
        """An earlier run in place of what is shown."""
        on = self.on
        try:
            with received(paths) as files:
                run = self.sweeps.earlier(str(request.session_hash), files)
            told = {on.warning: "", on.state: said(title_of(run))}
            return {**told, **self._shown(run, axis, files_of(run, run.folder))}
        except Exception as error:
            return {on.warning: fault(error), on.state: "", **on.cleared()}

    def turned(self, run: Run | None, axis: str) -> dict[Any, Any]:
        try:
            return {self.on.plot: None if run is None else drawn(run, axis)}
        except Exception as error:
            return {self.on.warning: fault(error), self.on.plot: None}

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

    def left(self, request: gr.Request) -> None:
        self.sweeps.leave(str(request.session_hash))

    def _shown(self, run: Run, axis: str, files: dict[str, Path] | None) -> dict[Any, Any]:
        on = self.on
        heads, body = rows_of(run)
        out: dict[Any, Any] = {
            on.held: run, on.plot: drawn(run, axis),
            on.table: gr.Dataframe({"headers": heads, "data": body}, visible=True),
        }  # fmt: skip
        for button, kind in ((on.as_csv, "csv"), (on.as_html, "html")):
            out[button] = gr.DownloadButton(value=str(files[kind]) if files else None, interactive=files is not None)
        return out
