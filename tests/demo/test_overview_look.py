"""Pictures of the first tab, and what is computed of them."""

from __future__ import annotations

import html

import numpy as np
import pytest
import stored_rows
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("mlxtend")

from tokenreduce.demo.overview import rows_at
from tokenreduce.demo.overview_look import asked_of, clocked, looked_at, table_of
from tokenreduce.demo.overview_pictures import MOST, makes, pictures_of, the_picture
from tokenreduce.demo.store import Store


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


def of(data: str):
    return stored_rows.run_of("any", data, "vision", "accuracy", [])


@pytest.mark.parametrize("data", ["digits", "world", "world2"])
def test_pictures_come_from_the_data_of_the_run(data: str) -> None:
    pictures = pictures_of(of(data))
    assert len({p.number for p in pictures}) == len(pictures) == MOST
    assert all(p.labels and p.truth for p in pictures)
    assert all(p.questions for p in pictures) == (data != "digits")
    assert the_picture(of(data), pictures[-1].number) is pictures[-1]
    with pytest.raises(ValueError, match="no picture 999; there are: "):
        the_picture(of(data), 999)


def test_other_data_have_no_pictures() -> None:
    assert pictures_of(of("/data/imagenet")) == ()


@pytest.mark.parametrize(("data", "world"), [("world", "1"), ("world2", "2")])
def test_the_command_draws_the_same_picture(data: str, world: str, tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from tokenreduce.cli import app

    monkeypatch.chdir(tmp_path)
    picture = pictures_of(of(data))[2]
    line = makes(of(data), picture)
    assert ("--world 2" in line) == (world == "2")
    assert CliRunner().invoke(app, line.split()[1:]).exit_code == 0
    assert np.array_equal(Image.open("scene.png"), picture.image)


def test_a_classifier_names_as_many_labels_as_there_are(store) -> None:
    run = stored_rows.digits()
    loaded, row, picture = store.image("digits-vit"), rows_at(run, 0.5)[0], pictures_of(run)[3]
    seen = looked_at(loaded, row, picture)
    lines = {name: (a, b) for name, a, b in seen.lines}
    assert lines["answer"][0] == "✓\N{NO-BREAK SPACE}3 (1 of 1 label)"
    assert lines["tokens at the end"][0] == "50"
    assert " %)" in lines["FLOPs"][1]
    assert seen.about.endswith("In the picture: 3.")
    assert not np.array_equal(np.asarray(seen.after), np.asarray(picture.image))
    name, stock, reduced = clocked(loaded, seen, picture)
    assert name == "time of one image"
    assert stock.endswith("s")
    assert "er)" in reduced


def test_a_language_model_answers_twice(store) -> None:
    run = stored_rows.questions()
    row, picture = rows_at(run, 0.5)[0], pictures_of(run)[0]
    seen = asked_of(store.copy("world-llava"), row, picture, 1)
    lines = {name: (a, b) for name, a, b in seen.lines}
    assert lines["answer"][0] == picture.questions[1][1]
    assert lines["FLOPs of all questions"] == ("100 %", "50 %")
    assert " %)" in lines["KV cache"][1]
    assert f"Asked: {picture.questions[1][0]}." in seen.about


def test_the_table_is_literal() -> None:
    table = table_of([("<b>", "a & b", "c")], "<i>")
    assert "<b>" not in table
    assert "<i>" not in table
    assert "<b>" in html.unescape(table)
