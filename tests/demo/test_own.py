"""The tab "Your model" without a browser."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("plotly")
pytest.importorskip("mlxtend")

import gradio as gr

from tokenreduce.demo import own, own_events
from tokenreduce.demo.app import build
from tokenreduce.demo.own import about, examples_of, lead, models_of, named, pictures_from, question_of, task_for
from tokenreduce.demo.own_events import Events, Widgets, thumbnails
from tokenreduce.demo.store import Store
from tokenreduce.demo.trade import Sweeps

NAMES = [f.name for f in fields(Widgets)]
VISITOR = SimpleNamespace(session_hash="a")


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


@pytest.fixture
def events(store, tmp_path: Path) -> Events:
    """On widgets that are no more than their names."""
    return Events(Sweeps(store, tmp_path), Widgets(**{name: name for name in NAMES}))  # type: ignore[arg-type]


def steps(made: Any) -> list[dict[str, Any]]:
    out = list(made)
    assert all(isinstance(step, dict) and step for step in out), "an empty one is an error for Gradio"
    assert all({*step} <= {*NAMES} for step in out)
    return out


def files(folder: Path, *names: str) -> list[Path]:
    for i, name in enumerate(names):
        Image.new("RGB", (40 + i, 30), (60 * i, 9, 9)).save(folder / name)
    return [folder / name for name in names]


def started(events: Events, model: str, methods: list[str], budgets: list[str], n: int, mine: Any = None) -> Any:
    return events.start(model, methods, budgets, n, VISITOR, question_of(model), mine, "flops")


def test_a_sweep_comes_row_by_row_and_ends_with_files(events) -> None:
    made = steps(started(events, "digits-vit", ["tome"], ["50 %"], 6))
    told = [step["state"] for step in made]
    assert "loading" in told[0]
    assert any("1 of 5 rows" in text.replace("&#32;", " ") for text in told)
    last = made[-1]
    assert "Done: 5 rows" in last["state"].replace("&#58;", ":")
    assert last["held"].metric == "agreement"
    table = last["table"].value
    heads = table["headers"] if isinstance(table, dict) else last["table"].headers
    assert "agree %" in heads
    assert "FLOPs %" in heads
    file = Path(last["as_csv"].value["path"] if isinstance(last["as_csv"].value, dict) else last["as_csv"].value)
    assert "agreement" in file.read_text(encoding="utf-8").splitlines()[0]


def test_a_stop_keeps_the_rows_so_far(events) -> None:
    run = started(events, "digits-vit", ["tome", "evit"], ["75 %", "50 %"], 4)
    seen: list[dict[str, Any]] = []
    for step in run:
        seen.append(step)
        if step.get("held") is not None and len(step["held"].good) == 2:
            events.halt(VISITOR)
    last = seen[-1]
    assert last["state"].startswith("<p>Stopped")
    assert 2 <= len(last["held"].good) < 11
    assert last["as_csv"].interactive
    again = steps(started(events, "digits-vit", ["tome", "evit"], ["75 %", "50 %"], 4))
    rows = [len(step["held"].good) for step in again if step.get("held") is not None]
    assert rows[0] >= len(last["held"].good), "it goes on where it stopped"
    assert rows[-1] == 11


def test_uploads_take_the_place_of_the_examples(events, tmp_path: Path) -> None:
    made = events.uploaded([str(p) for p in files(tmp_path, "a.png", "b.jpg")])
    assert [p.name for p in made["mine"]] == ["a.png", "b.jpg"]
    assert made["warning"] == ""
    assert len(made["gallery"]) == 2
    assert not (tmp_path / "a.png").exists(), "uploads are deleted once they are read"
    swept = steps(started(events, "digits-vit", ["tome"], ["50 %"], 24, made["mine"]))
    assert {row["images"] for row in swept[-1]["held"].good} == {2}
    back = events.returned("digits-vit")
    assert back["mine"] is None
    assert len(back["gallery"]) == 12


def test_a_broken_upload_is_told_and_loses_nothing(events, tmp_path: Path) -> None:
    good, bad = files(tmp_path, "good.png", "bad.png")
    bad.write_bytes(bad.read_bytes()[:40])
    made = events.uploaded([str(good), str(bad)])
    assert {*made} == {"warning"}, "the pictures and rows before stay"
    assert "bad" in made["warning"]
    assert "save it again" in made["warning"].replace("&#32;", " ")


@pytest.mark.parametrize(
    ("model", "methods", "budgets", "words"),
    [
        ("digits-vit", [], ["50 %"], "at least one method"),
        ("digits-vit", ["tome"], [], "at least one budget"),
        ("timm:other", ["tome"], ["50 %"], "not on this page"),
        ("digits-vit", ["visionzip"], ["50 %"], "visionzip acts at stage projector"),
    ],
)
def test_what_cannot_be_run_is_told(events, model: str, methods, budgets, words: str) -> None:
    last = steps(started(events, model, methods, budgets, 4))[-1]
    told = last["warning"].replace("&#39;", "'")
    assert words in told
    assert last["go"]["interactive"]


def test_another_model_brings_its_pictures_unless_there_are_own_ones(events) -> None:
    made = steps(events.switched("world-llava", None))
    assert made[0]["question"].visible
    assert len(made[-1]["gallery"]) == 12
    assert "fastv" in made[-1]["methods"].value
    assert "gallery" not in steps(events.switched("digits-vit", named(examples_of(events.sweeps.store, "x"))))[-1]


def test_the_lead_names_the_command_or_the_model(store, tmp_path: Path) -> None:
    assert f"`{own.COMMAND}`" in lead(store)
    assert len(lead(store).splitlines()) == 1
    mine = Store()
    mine.own = str(tmp_path / "my_<b>_model")
    mine.images.append(mine.own)
    assert models_of(mine)[0] == mine.own
    assert "<b>" not in lead(mine)
    assert examples_of(mine, mine.own) == own.photographs()
    page = build(store, tmp_path)
    assert lead(store) in [b.value for b in page.blocks.values() if isinstance(b, gr.Markdown)]


def test_without_photographs_it_says_what_to_do(store, monkeypatch) -> None:
    monkeypatch.setattr(own, "photographs", lambda: ())
    mine = Store()
    mine.own = "timm:x"
    assert about(named(examples_of(mine, "timm:x")), False) == (
        "Upload some pictures, or have photographs here: pip install scikit-image"
    )
    with pytest.raises(ValueError, match="no pictures yet"):
        task_for(store, "digits-vit", [], "")


def test_a_language_model_is_asked_the_question(store) -> None:
    pytest.importorskip("transformers")
    task = task_for(store, "world-llava", named(examples_of(store, "world-llava"))[:2], "what is the background")
    row = task.measure(())
    assert row["questions"] == 2
    with pytest.raises(ValueError, match="question is empty"):
        task_for(store, "world-llava", named(examples_of(store, "world-llava")), " ")


def test_too_many_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 24 are taken"):
        pictures_from([tmp_path / "x.png"] * 25)


def test_thumbnails_are_small(store) -> None:
    assert all(84 <= max(t.size) <= 160 for t in thumbnails(named(examples_of(store, "world-vit-2"))))
    assert own_events.FIRST
