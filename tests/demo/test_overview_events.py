"""The events of the first tab, without a browser: what they give to the page."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import stored_rows

pytest.importorskip("gradio")
pytest.importorskip("plotly")
pytest.importorskip("mlxtend")

import gradio as gr

from tokenreduce.demo.overview import BEST, start
from tokenreduce.demo.overview_events import Events, Widgets, values_of
from tokenreduce.demo.store import Store

FIRST = ("digits-vit", 0.5, BEST, 0, None, "http://here/")


@pytest.fixture
def events() -> Events:
    """On widgets that are no more than their names."""
    runs = [stored_rows.digits(), stored_rows.questions()]
    return Events(Store(), runs, Widgets(**{f.name: f.name for f in fields(Widgets)}))  # type: ignore[arg-type]


def steps(made: Any) -> list[dict[str, Any]]:
    out = list(made)
    assert all(isinstance(step, dict) and step for step in out), "an empty one is an error for Gradio"
    return out


def test_the_picture_comes_before_the_clock(events: Events) -> None:
    first, last = steps(events.look(*FIRST))
    assert first["after"] is not None
    assert "time of one image" not in first["answers"]
    assert "time of one image" in last["answers"]


def test_who_waits_for_the_machine_is_told(events: Events) -> None:
    place = events.store.turn.join()
    looking = events.look(*FIRST)
    told = next(looking)
    assert "waiting" in told["about"]
    assert told["after"] is None
    place.leave()
    assert "In the picture" in steps(looking)[-1]["about"]


def test_what_cannot_be_shown_is_told(events: Events) -> None:
    (told,) = steps(events.look("digits-vit", 0.5, BEST, 99, None, ""))
    assert "no picture 99" in told["warning"]
    (told,) = steps(events.look("resnet", 0.5, BEST, 0, None, ""))
    assert "not on this page" in told["warning"]


def test_a_point_that_is_no_row_changes_nothing(events: Events) -> None:
    assert steps([events.clicked("unreduced", *FIRST), events.clicked("", *FIRST)])
    made = events.clicked("evit@0.35", *FIRST)
    assert (made["at"], made["link"]) == (0.35, "http://here/?run=digits-vit&budget=0.35&method=evit&picture=0")


def test_the_slider_is_not_moved_while_somebody_types(events: Events) -> None:
    made = events.slid(36, *FIRST)
    assert made["at"] == 0.35
    assert "budget" not in made
    assert events.settled(36, "digits-vit") == 35


def test_another_model_brings_its_own(events: Events) -> None:
    made = events.switched("world-llava", "http://here/")
    assert made["at"] == 0.35
    assert made["question"]["visible"]
    assert made["budget"]["maximum"] == 50
    assert "question=0" in made["link"]
    assert isinstance(made["gallery"], gr.Gallery)


def test_a_question_of_another_picture_is_the_first(events: Events) -> None:
    for question in (None, 99, -1, "x"):
        made = events.turned("world-llava", 0.5, BEST, 2, question, None)
        assert made["question"]["value"] == 0


def test_what_is_shown_at_first_has_a_widget(events: Events) -> None:
    run = stored_rows.digits()
    assert {*values_of(run, start(run))} <= {f.name for f in fields(Widgets)}
