"""What happens on the first tab when a visitor does something there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from tokenreduce.bench.columns import label
from tokenreduce.bench.runs import Run
from tokenreduce.demo.common import HEAVY, clear_at_once, fault, in_turn, literal, said
from tokenreduce.demo.image import enlarged
from tokenreduce.demo.overview import (
    BEST,
    Asked,
    choices_at,
    drawn,
    headline,
    link_of,
    model_of,
    python_of,
    read_link,
    row_of,
    rows_at,
    shell_of,
    slider_of,
    snapped,
    start,
    table_at,
)
from tokenreduce.demo.overview_look import Seen, asked_of, clocked, looked_at, table_of
from tokenreduce.demo.overview_pictures import pictures_of, the_picture
from tokenreduce.demo.store import Store

__all__ = ["CLICKS", "Events", "Widgets", "values_of"]

Updates = Iterator[dict[Any, Any]]

#: Who clicks on a point of the plot presses a button that is not seen: Gradio's plot has no such event.
CLICKS = """() => {
  const told = (plot) => plot.on('plotly_click', (event) => {
    const id = event.points.map(p => p.customdata).find(Boolean);
    if (!id) return;
    window.tokenreducePoint = id;
    document.querySelector('#overview-point').click();
  });
  setInterval(() => {
    const plot = document.querySelector('#overview-plot .js-plotly-plot');
    if (plot && plot.on && !plot.dataset.told) { plot.dataset.told = 'yes'; told(plot); }
  }, 500);
}"""
POINT = "(_, ...values) => [window.tokenreducePoint || '', ...values]"
#: Where the page lies, for its link: only the browser knows.
HERE = "() => [location.origin + location.pathname]"
#: The address follows, so that going back to the page finds what was left; what is not ours in it stays.
ADDRESS = """(link) => {
  const to = new URL(link, location.href);
  for (const [key, value] of new URL(location.href).searchParams)
    if (key.startsWith('__')) to.searchParams.set(key, value);
  history.replaceState(history.state, '', to);
}"""


@dataclass(frozen=True, eq=False)
class Widgets:
    """What is on the tab; ``at`` (the budget) and ``picture`` (its number) are what the server keeps for a visitor;
    ``here``, ``clicked`` and ``point`` are not seen."""

    run: gr.Dropdown
    budget: gr.Slider
    method: gr.Dropdown
    gallery: gr.Gallery
    question: gr.Dropdown
    warning: gr.HTML
    headline: gr.HTML
    plot: gr.Plot
    table: gr.Dataframe
    before: gr.Image
    after: gr.Image
    about: gr.HTML
    answers: gr.HTML
    python: gr.Code
    shell: gr.Code
    link: gr.Textbox
    here: gr.Textbox
    clicked: gr.Textbox
    point: gr.Button
    at: gr.State
    picture: gr.State

    @property
    def controls(self) -> list[Any]:
        """What a visitor looks at, and where."""
        return [self.run, self.at, self.method, self.picture, self.question, self.here]

    @property
    def computed(self) -> list[Any]:
        """What a model makes."""
        return [self.after, self.about, self.answers]

    @property
    def chosen(self) -> list[Any]:
        """Everything that is there without a model, and the controls themselves."""
        return [
            self.run, self.budget, self.at, self.method, self.picture, self.question, self.warning, self.headline,
            self.plot, self.table, self.python, self.shell, self.link, self.gallery, self.before,
        ]  # fmt: skip


def headline_of(run: Run, budget: float) -> str:
    """The finding, with every number on the line of its sign."""
    return f'<p class="headline">{literal(headline(run, budget).replace(" %", chr(160) + "%"))}</p>'


def values_of(run: Run, asked: Asked, here: str = "") -> dict[str, Any]:
    """What the widgets show of a run without a model, by the names of :class:`Widgets`."""
    row, picture = row_of(run, asked), the_picture(run, asked.picture)
    heads, body = table_at(run, asked.budget)
    least, most, step = slider_of(run)
    questions = [(text, i) for i, (text, _) in enumerate(picture.questions)]
    return {
        "run": model_of(run), "at": asked.budget, "picture": asked.picture,
        "budget": {
            "minimum": least, "maximum": most, "step": step, "value": round(100 * asked.budget, 1),
            "label": f"Budget: % of the unreduced {run.axis.label}",
        },
        "method": {"choices": choices_at(run, asked.budget), "value": asked.method},
        "question": {
            "choices": questions, "value": asked.question if questions else None,
            "visible": run.info.get("task") == "vlm",
        },
        "headline": headline_of(run, asked.budget),
        "plot": drawn(run, asked), "table": {"value": {"headers": heads, "data": body}},
        "python": python_of(row), "shell": shell_of(run, row, picture, asked.question),
        "link": link_of(run, asked, here),
    }  # fmt: skip


class Events:
    """The wiring of the tab: every method is what one event does, and gives what changes on the page."""

    def __init__(self, store: Store, runs: Sequence[Run], widgets: Widgets) -> None:
        self.store, self.runs, self.on = store, {model_of(run): run for run in runs}, widgets

    def connect(self, page: gr.Blocks) -> None:
        """Tie the methods to the page."""
        on = self.on
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        follow: dict[str, Any] = {**quiet, "trigger_mode": "always_last"}
        seen = [on.warning, *on.computed]
        page.load(None, None, None, js=CLICKS)
        first = [
            page.load(self.opened, [on.here], [*on.chosen, on.here], js=HERE, **quiet),
            on.budget.input(
                self.slid, [on.budget, *on.controls], [c for c in on.chosen if c is not on.budget], **follow
            ),
            gr.on([on.method.input, on.question.input], self.turned, on.controls, on.chosen, **follow),
            on.run.input(self.switched, [on.run, on.here], on.chosen, **follow),
            on.gallery.select(self.picked, on.controls, on.chosen, **follow),
            on.table.select(self.pointed, on.controls, on.chosen, **follow),
            on.point.click(self.clicked, [on.clicked, *on.controls], on.chosen, js=POINT, **follow),
        ]
        then = [
            event.then(
                self.look, on.controls, seen, **HEAVY, show_progress="minimal", show_progress_on=on.after
            )
            for event in first
        ]  # fmt: skip
        clear_at_once([on.run.input, on.gallery.select, on.question.input], on.computed, then)
        # Not before: what the slider is set to meanwhile would come between the digits that somebody types.
        on.budget.release(self.settled, [on.budget, on.run], on.budget, **quiet)
        on.link.change(None, on.link, None, js=ADDRESS, **quiet)

    def opened(self, here: str, request: gr.Request) -> dict[Any, Any]:
        """What the link asks for, and where the page lies."""
        try:
            query = {str(k): str(v) for k, v in dict(request.query_params).items()}
            asked, wrong = read_link([*self.runs.values()], query)
            return {**self._chosen(asked, here, whole=True), self.on.warning: said(wrong), self.on.here: here}
        except Exception as error:
            return {self.on.warning: fault(error)}

    def slid(self, percent: float, *controls: Any) -> dict[Any, Any]:
        """Another budget: the nearest that was measured."""
        asked, here = self._asked(*controls)
        made = self._at(replace(asked, budget=snapped(self.runs[asked.run], percent)), here)
        return {on: value for on, value in made.items() if on is not self.on.budget}

    def settled(self, percent: float, name: str) -> float:
        """Where the slider is put when it is let go."""
        return round(100 * snapped(self._run(name), percent), 1)

    def turned(self, *controls: Any) -> dict[Any, Any]:
        return self._chosen(*self._asked(*controls))

    def switched(self, name: str, here: str | None) -> dict[Any, Any]:
        """Another model: its budgets, methods and pictures."""
        made = self._chosen(start(self._run(name)), here or "", whole=True)
        return {**made, self.on.gallery: gr.Gallery(made[self.on.gallery], selected_index=None)}

    def picked(self, event: gr.SelectData, *controls: Any) -> dict[Any, Any]:
        """Another picture, with the first question about it."""
        asked, here = self._asked(*controls)
        picture = pictures_of(self.runs[asked.run])[event.index]
        return self._chosen(replace(asked, picture=picture.number, question=0), here, whole=True)

    def pointed(self, event: gr.SelectData, *controls: Any) -> dict[Any, Any]:
        """A row of the table: its method."""
        asked, here = self._asked(*controls)
        told = event.row_value[0]  # the visitor may have sorted the table
        known = [r["method"] for r in rows_at(self.runs[asked.run], asked.budget)]
        return self._chosen(replace(asked, method=told if told in known else BEST), here)

    def clicked(self, point: str, *controls: Any) -> dict[Any, Any]:
        """A point of the plot: its budget and method."""
        asked, here = self._asked(*controls)
        row = next((r for r in self.runs[asked.run].good if r["id"] == point), None)
        if row is None or row not in rows_at(self.runs[asked.run], row.get("budget") or 0.0):
            return {self.on.warning: gr.update()}
        return self._at(replace(asked, budget=row["budget"], method=row["method"]), here)

    def look(self, name: str, budget: float, how: str, number: int, question: int, here: str) -> Updates:
        """The picture and the answers, then the clock."""
        on = self.on
        try:
            asked, _ = self._asked(name, budget, how, number, question, here)
            run = self.runs[asked.run]
            row, picture = row_of(run, asked), the_picture(run, asked.picture)
            spec = label(row)
            if run.info.get("task") == "vlm":
                with (yield from in_turn(self.store.turn, self._waits)):
                    seen = asked_of(self.store.copy(name), row, picture, asked.question)
                yield self._computed(seen, spec)
                return
            loaded = self.store.image(name)
            with (yield from in_turn(self.store.turn, self._waits)):
                seen = looked_at(loaded, row, picture)
            yield self._computed(seen, spec)
            with (yield from in_turn(self.store.turn, lambda told: {on.about: said(told)})):
                line = clocked(loaded, seen, picture)
            yield {on.about: said(seen.about), on.answers: table_of([*seen.lines, line], spec)}
        except Exception as error:
            yield {on.warning: fault(error), on.after: None, on.about: "", on.answers: ""}

    def _run(self, name: str) -> Run:
        if name not in self.runs:  # names come from the browser
            raise ValueError(f"{name!r} is not on this page; there are: {', '.join(self.runs)}")
        return self.runs[name]

    def _asked(
        self, name: str, budget: float, how: str, number: int, question: int | None, here: str | None
    ) -> tuple[Asked, str]:
        run = self._run(name)
        questions = the_picture(run, number).questions
        place = question if isinstance(question, int) and 0 <= question < len(questions) else 0
        return Asked(name, budget, how, number, place), here or ""

    def _at(self, asked: Asked, here: str) -> dict[Any, Any]:
        """What another budget changes; a method that has no row there gives way to the best one, and that is said."""
        run, lost = self.runs[asked.run], ""
        if asked.method != BEST and asked.method not in [r["method"] for r in rows_at(run, asked.budget)]:
            lost = f"{asked.method} has no row at {100 * asked.budget:.4g} %; the best one there is shown"
            asked = replace(asked, method=BEST)
        return {**self._chosen(asked, here), self.on.warning: said(lost)}

    def _chosen(self, asked: Asked, here: str, whole: bool = False) -> dict[Any, Any]:
        """What is there without a model; with ``whole`` the pictures as well."""
        on, run = self.on, self.runs[asked.run]
        made: Mapping[str, Any] = values_of(run, asked, here)
        out = {getattr(on, k): gr.update(**v) if isinstance(v, dict) else v for k, v in made.items()}
        out[on.warning] = ""
        if whole:
            out[on.gallery] = [p.image for p in pictures_of(run)]
            out[on.before] = enlarged(the_picture(run, asked.picture).image)
        return out

    def _waits(self, told: str) -> dict[Any, Any]:
        on = self.on
        return {on.about: said(told), on.after: None, on.answers: ""}

    def _computed(self, seen: Seen, spec: str) -> dict[Any, Any]:
        on = self.on
        return {on.after: seen.after, on.about: said(seen.about), on.answers: table_of(seen.lines, spec)}
