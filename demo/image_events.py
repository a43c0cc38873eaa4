"""What happens on the image tab when a visitor does something there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tokenreduce.bench.models import Loaded
from tokenreduce.demo.common import HEAVY, chosen, clear_at_once, fault, in_turn, method_choices, received, said
from tokenreduce.demo.image import SEVERAL, drawn, enlarged, examples_of, facts, probabilities, thumbnails
from tokenreduce.demo.store import Store
from tokenreduce.demo.uploads import image_from
from tokenreduce.measure.image import ImageComparison, clock_image, compare_image
from tokenreduce.measure.plots import image_layers_plot

__all__ = ["Events"]

Updates = Iterator[dict[Any, Any]]
#: Stands for the last layer, whatever its number is.
LAST = 1 << 10


@dataclass(frozen=True, eq=False)
class Widgets:
    """What is on the tab; ``picture``, ``truth`` and ``seen`` are what the server keeps for a visitor."""

    model: gr.Dropdown
    method: gr.Dropdown
    keep: gr.Slider
    batch: gr.Dropdown
    gallery: gr.Gallery
    upload: gr.UploadButton
    warning: gr.HTML
    before: gr.Image
    after: gr.Image
    layer: gr.Slider
    caption: gr.HTML
    stock: gr.Label
    reduced: gr.Label
    table: gr.Markdown
    plot: gr.Plot
    picture: gr.State
    truth: gr.State
    seen: gr.State

    @property
    def controls(self) -> list[Any]:
        """What a run is made from."""
        return [self.model, self.picture, self.truth, self.method, self.keep, self.layer, self.batch]

    @property
    def answers(self) -> list[Any]:
        """What belongs to one picture and one setting, and to no other."""
        return [self.after, self.stock, self.reduced, self.caption, self.table, self.plot]

    @property
    def shown(self) -> list[Any]:
        """Everything that a run may change."""
        return [self.warning, self.picture, self.truth, self.seen, self.before, self.layer, *self.answers]

    def cleared(self) -> dict[Any, Any]:
        """No answers."""
        return {self.seen: None, **dict.fromkeys(self.answers), self.caption: "", self.table: ""}


class Events:
    """The wiring of the tab: every method is what one event does, and yields what changes on the page."""

    def __init__(self, store: Store, widgets: Widgets) -> None:
        self.store, self.on = store, widgets

    def connect(self, opens: Callable[..., Any]) -> None:
        """Tie the methods to the page; ``opens`` is the event of a visitor who sees the tab."""
        on = self.on
        # A small note that runs along; who waits for others is told so by `in_turn`.
        quiet: dict[str, Any] = {**HEAVY, "show_progress": "minimal", "show_progress_on": on.keep}
        runs = gr.on([on.method.input, on.keep.input, on.batch.input], self.run, on.controls, on.shown, **quiet)
        first = opens(
            self.visited, [on.seen, *on.controls], [*on.shown, on.method, on.gallery], **HEAVY, show_progress="minimal"
        )
        other = [on.upload.upload, on.gallery.select, on.model.input]
        clear_at_once(other, on.answers, [runs, first])
        on.upload.upload(self.uploaded, [on.upload, *on.controls], on.shown, **HEAVY)
        on.gallery.select(self.picked, on.controls, on.shown, **quiet)
        on.model.input(self.switched, on.controls, [*on.shown, on.method, on.gallery], **HEAVY)
        on.layer.input(
            self.layered, [on.seen, on.layer, on.truth], [on.after, on.caption], show_progress="hidden",
            trigger_mode="always_last",
        )  # fmt: skip

    def run(
        self, name: str, image: Image.Image | None, truth: str, how: str, percent: float, at: float, n: int
    ) -> Updates:
        """Numbers and pictures as soon as they are there, then the clock."""
        on = self.on
        try:
            if image is None:
                example = examples_of(name)[0]
                image, truth = example.image, example.truth
            loaded = self.store.image(name)
            with (yield from in_turn(self.store.turn, self._waits)):
                made = compare_image(loaded, image, chosen("encoder", how, percent))
            kept = {on.warning: "", on.picture: image, on.truth: truth, on.seen: made}
            yield {**kept, **self._compared(loaded, made, at, truth, int(n))}
            with (yield from in_turn(self.store.turn, lambda text: {on.warning: said(text)})):
                clock = clock_image(loaded, image, made.reducers, batch=int(n))
            yield {on.warning: "", on.table: facts(made, clock, int(n))}
        except Exception as error:
            yield {on.warning: fault(error), **on.cleared()}

    def visited(self, seen: ImageComparison | None, *controls: Any) -> Updates:
        """The first visit loads the model and shows something without a click."""
        yield {self.on.warning: ""}
        if seen is None:
            yield from self.switched(*controls)

    def uploaded(self, path: str, name: str, *rest: Any) -> Updates:
        on = self.on
        yield on.cleared()
        try:
            with received(path) as files:
                image = image_from(files[0])
        except Exception as error:
            yield {on.warning: fault(error)}
            return
        yield from self._put(image, "", name, *rest)

    def picked(self, event: gr.SelectData, name: str, *rest: Any) -> Updates:
        yield self.on.cleared()
        example = examples_of(name)[event.index]
        yield from self._put(example.image, example.truth, name, *rest)

    def switched(self, name: str, _: Any, __: Any, how: str, percent: float, at: float, n: int) -> Updates:
        """Another model: its methods, its examples, the first of them."""
        on = self.on
        yield {on.warning: said(f"loading {name} ..."), on.picture: None, on.before: None, **on.cleared()}
        try:
            names = self.store.methods(name)["encoder"]
        except Exception as error:
            yield {on.warning: fault(error)}
            return
        how = how if how in names else "tome" if "tome" in names else names[0]
        yield {on.method: gr.Dropdown(method_choices("encoder", names), value=how), on.gallery: thumbnails(name)}
        yield from self.run(name, None, "", how, percent, LAST, n)

    def layered(self, made: ImageComparison | None, at: float, truth: str) -> dict[Any, Any]:
        if made is None:
            return {self.on.caption: "Nothing was computed yet."}
        after, about = drawn(made, at, truth)
        return {self.on.after: after, self.on.caption: said(about)}

    def _put(self, image: Image.Image, truth: str, name: str, _: Any, __: Any, *rest: Any) -> Updates:
        """A new picture: it is what later runs are about, also when this one fails."""
        on = self.on
        yield {on.picture: image, on.truth: truth, on.before: enlarged(image)}
        yield from self.run(name, image, truth, *rest)

    def _waits(self, text: str) -> dict[Any, Any]:
        return {self.on.warning: said(text), **self.on.cleared()}

    def _compared(self, loaded: Loaded, made: ImageComparison, at: float, truth: str, n: int) -> dict[Any, Any]:
        on, depth = self.on, made.look.depth
        after, about = drawn(made, at, truth)
        stock, reduced = (_label(probabilities(loaded, s.outputs), loaded.name) for s in (made.stock, made.reduced))
        return {
            on.before: enlarged(made.look.image), on.after: after, on.caption: said(about),
            on.stock: stock, on.reduced: reduced, on.layer: gr.Slider(maximum=depth, value=min(int(at), depth)),
            on.table: facts(made, None, n), on.plot: image_layers_plot(made),
        }  # fmt: skip


def _label(shares: dict[str, float] | None, model: str) -> gr.Label:
    """The best class stands in large letters, unless there may be several."""
    return gr.Label(shares, visible=shares is not None, show_heading=model not in SEVERAL)
