"""What tabs with a sweep share: it starts or waits, grows row by row, stops, and can be taken away as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.bench.live import Progress
from tokenreduce.bench.runs import Run
from tokenreduce.demo.common import WAITING, fault, message, said
from tokenreduce.demo.trade import Sweeps, drawn, files_of, rows_of, said_of

__all__ = ["SweepEvents", "SweepWidgets", "Updates", "results"]

Updates = Iterator[dict[Any, Any]]
AXES = {"flops": "FLOPs", "tokens": "tokens", "clock": "measured time"}


@dataclass(frozen=True, eq=False)
class SweepWidgets:
    """Buttons and results of a sweep; ``held`` (the run that is shown) is what the server keeps for a visitor."""

    go: gr.Button
    stop: gr.Button
    warning: gr.HTML
    state: gr.HTML
    against: gr.Radio
    plot: gr.Plot
    as_csv: gr.DownloadButton
    as_html: gr.DownloadButton
    table: gr.Dataframe
    held: gr.State

    @property
    def settings(self) -> list[Any]:
        """What a sweep is made from."""
        raise NotImplementedError("abstract")

    @property
    def still(self) -> list[Any]:
        """What stands still while a sweep runs."""
        return [*self.settings, self.go]

    @property
    def shown(self) -> list[Any]:
        """Everything that a run may change."""
        files = [self.as_csv, self.as_html]
        return [self.warning, self.state, self.held, self.plot, self.table, *files, self.stop, *self.still]

    def cleared(self) -> dict[Any, Any]:
        """No run."""
        gone = {b: gr.DownloadButton(value=None, interactive=False) for b in (self.as_csv, self.as_html)}
        return {self.held: None, self.plot: None, self.table: gr.Dataframe(None, visible=False), **gone}

    def busy(self, now: bool) -> dict[Any, Any]:
        """Whether a sweep of this visitor runs or waits."""
        free = {kind: gr.update(interactive=not now) for kind in self.still}
        return {**free, self.stop: gr.Button(interactive=now)}


class SweepEvents:
    """The wiring of a sweep: every method is what one event does, and gives what changes on the page."""

    def __init__(self, sweeps: Sweeps, widgets: SweepWidgets) -> None:
        self.sweeps, self.on = sweeps, widgets

    def connect_sweep(self, page: gr.Blocks, start: Any, inputs: list[Any]) -> None:
        """Tie the methods to the page; ``start`` is what Run does."""
        on = self.on
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        # Sweeps line up behind each other in `Sweeps`, which tells them their place; Gradio's own line would not.
        on.go.click(start, inputs, on.shown, concurrency_id="sweep", concurrency_limit=WAITING, **quiet)
        # The word first: what the sweep says when it has stopped must come behind it.
        on.stop.click(self.stopping, None, [on.state, on.stop], **quiet).then(self.halt, None, None, **quiet)
        on.against.input(self.turned, [on.held, on.against], [on.warning, on.plot], **quiet)
        page.unload(self.left)

    def followed(self, progress: Iterable[tuple[Progress, Path]], axis: str) -> Updates:
        """Show a sweep row by row, and its place while it waits for those of others."""
        on = self.on
        for now, out in progress:
            ended = now.state in ("done", "stopped")
            run, idle = now.run, on.busy(False) if ended else {}
            files = files_of(run, out) if ended and run else None
            yield {on.state: said(said_of(now)), **idle, **(self.show(run, axis, files) if run else {})}

    def failed(self, error: Exception) -> dict[Any, Any]:
        """What went wrong instead of a run."""
        on = self.on
        return {on.warning: fault(error), on.state: "", **on.cleared(), **on.busy(False)}

    def stopping(self, request: gr.Request) -> dict[Any, Any]:
        on = self.on
        if not self.sweeps.runs(str(request.session_hash)):
            return {on.state: gr.update()}  # it ended just now, and has said so
        told = said("stopping; a row that is being measured ends first ...")
        return {on.state: told, on.stop: gr.Button(interactive=False)}

    def halt(self, request: gr.Request) -> None:
        self.sweeps.stop(str(request.session_hash))

    def turned(self, run: Run | None, axis: str) -> dict[Any, Any]:
        try:
            return {self.on.plot: None if run is None else drawn(run, axis)}
        except Exception as error:
            return {self.on.warning: fault(error), self.on.plot: None}

    def left(self, request: gr.Request) -> None:
        self.sweeps.leave(str(request.session_hash))

    def show(self, run: Run, axis: str, files: dict[str, Path] | None) -> dict[Any, Any]:
        """The plot and the rows of a run, and its ``files`` to take away where it has ended."""
        on = self.on
        heads, body = rows_of(run)
        out: dict[Any, Any] = {
            on.held: run, on.plot: drawn(run, axis),
            on.table: gr.Dataframe({"headers": heads, "data": body}, visible=True),
        }  # fmt: skip
        for button, kind in ((on.as_csv, "csv"), (on.as_html, "html")):
            out[button] = gr.DownloadButton(value=str(files[kind]) if files else None, interactive=files is not None)
        return out


def results(name: str, first: str, what: str) -> dict[str, Any]:
    """The widgets of the results; ids begin with ``name``, ``first`` is said before a sweep, ``what`` is plotted."""
    out: dict[str, Any] = {
        "warning": message(f"{name}-message"),
        "state": gr.HTML(said(first), elem_id=f"{name}-state", elem_classes="said"),
        "against": gr.Radio(
            [(text, key) for key, text in AXES.items()], value="flops", label=f"{what} against",
            elem_id=f"{name}-against",
        ),
        "plot": gr.Plot(show_label=False, elem_id=f"{name}-plot"),
    }  # fmt: skip
    with gr.Row():
        for key, text in (("csv", "CSV"), ("html", "HTML report")):
            out[f"as_{key}"] = gr.DownloadButton(
                f"Download {text}", interactive=False, elem_id=f"{name}-{key}", size="sm"
            )
    out["table"] = gr.Dataframe(
        elem_id=f"{name}-rows", interactive=False, wrap=False, show_label=False, max_height=420, visible=False
    )
    return out
