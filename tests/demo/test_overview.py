"""What the first tab chooses from, without a page: budgets, rows, words, and the link."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
import stored_rows

pytest.importorskip("gradio")
pytest.importorskip("plotly")
pytest.importorskip("mlxtend")

from tokenreduce.bench.runs import Run
from tokenreduce.demo import overview, stored
from tokenreduce.demo.overview import (
    BEST,
    Asked,
    best_at,
    budgets_of,
    choices_at,
    drawn,
    fitting,
    headline,
    link_of,
    python_of,
    read_link,
    row_of,
    rows_at,
    shell_of,
    slider_of,
    snapped,
    start,
    table_at,
    title_of,
)
from tokenreduce.demo.overview_pictures import pictures_of
from tokenreduce.demo.store import Store


@pytest.fixture
def run() -> Run:
    return stored_rows.digits()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    made = stored_rows.write(tmp_path / "stored")
    monkeypatch.setattr(stored, "FOLDER", made)
    return made


def test_runs_of_models_on_the_page_are_shown(folder: Path) -> None:
    store = Store()
    runs, why = fitting(store)
    assert [title_of(r) for r in runs] == ["world-llava (language model)", "digits-vit (classifier)"]
    assert why == ""
    store.languages.clear()
    assert [title_of(r) for r in fitting(store)[0]] == ["digits-vit (classifier)"]
    store.images.clear()
    runs, why = fitting(store)
    assert runs == []
    assert "world-llava, digits-vit" in why
    assert "Measure" in why


def test_damaged_rows_leave_the_rest_of_the_page(folder: Path) -> None:
    (folder / "digits-vit.jsonl").write_text("broken\n")
    runs, why = fitting(Store())
    assert runs == []
    assert "line 1 of" in why


def test_the_slider_stops_where_something_was_measured(run: Run) -> None:
    assert budgets_of(run) == [0.75, 0.5, 0.35]
    assert slider_of(run) == (35, 75, 5)
    assert [snapped(run, p) for p in (80, 75, 70, 60, 45, 41, 35, 0)] == [0.75, 0.75, 0.75, 0.5, 0.5, 0.35, 0.35, 0.35]
    run.rows = [r for r in run.rows if r["budget"] in (1.0, 0.5)]
    assert slider_of(run) == (50, 50, 1)
    assert snapped(run, 51) == 0.5


def test_the_best_row_meets_its_budget(run: Run) -> None:
    assert [r["method"] for r in rows_at(run, 0.5)] == ["evit", "tome", "random", "pitome"]
    assert best_at(run, 0.5)["method"] == "evit"
    assert row_of(run, Asked("digits-vit", 0.5, "tome"))["id"] == "tome@0.5"
    assert row_of(run, Asked("digits-vit", 0.35, "ats"))["id"] == "tome@0.35", "the best where it has none"
    assert start(run) == Asked("digits-vit", 0.5, BEST, 0)
    labels, methods = zip(*choices_at(run, 0.5), strict=True)
    assert labels[:2] == ("the best here: evit", "evit (95.0 %)")
    assert "random (60.0 %, baseline)" in labels
    assert methods == (BEST, "evit", "tome", "random", "pitome")
    run.rows = [r for r in run.rows if r["method"] in ("unreduced", "random")]
    assert best_at(run, 0.5)["method"] == "random"


def test_the_sentence_and_the_table_are_of_the_budget(run: Run) -> None:
    assert headline(run, 0.5).startswith("50 % of the FLOPs: evit keeps 95.0 of 98.0 %")
    assert headline(run, 0.75) != headline(run, 0.5)
    heads, body = table_at(run, 0.75)
    assert heads == ["method", "top-1 %", "hard %", "FLOPs %", "speed-up"]
    assert body[0] == ["tome", "97.0 ±1.0", "90.0", "75.0", "1.20x"]
    assert [line[0] for line in body] == ["tome", "evit", "random", "ats"]
    assert table_at(run, 0.5)[0] == ["method", "top-1 %", "FLOPs %"], "only what a row has"
    run.rows = [r for r in run.rows if r["method"] in ("unreduced", "random")]
    assert "no method was measured that meets this budget" in headline(run, 0.5)


def test_the_plot_marks_budget_and_method(run: Run) -> None:
    figure = drawn(run, Asked("digits-vit", 0.5, "tome"))
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (50, 50)
    widths = {t.name: t.line.width for t in figure.data}
    assert widths["tome"] > widths["evit"] == widths["random"]
    assert {"evit", "tome", "random", "better", "unreduced 98.0 %"} <= {a.text for a in figure.layout.annotations}
    tome = next(t for t in figure.data if t.name == "tome")
    assert list(tome.customdata) == ["tome@0.35", "tome@0.5", "tome@0.75"]
    assert not figure.layout.showlegend


def test_a_row_becomes_the_lines_that_do_the_same(run: Run) -> None:
    row, picture = row_of(run, Asked("digits-vit", 0.5, "tome")), pictures_of(run)[2]
    assert python_of(row) == 'tr.patch(model, "tome:keep=0.35")'
    assert shell_of(run, row, picture) == "tokenreduce show digits-vit IMAGE.png --reduce tome:keep=0.35"
    asks = stored_rows.questions()
    picture = pictures_of(asks)[2]
    made, line = shell_of(asks, rows_at(asks, 0.5)[0], picture, 1).splitlines()
    assert made == "tokenreduce scene scene.png --seed 2"
    assert line.startswith("tokenreduce generate world-llava --image scene.png --prompt '")
    assert picture.questions[1][0] in line
    assert line.endswith("--reduce visionzip:keep=0.35")


def test_a_link_restores_what_it_was_made_of(run: Run) -> None:
    runs = [run, stored_rows.questions()]
    for asked in (
        Asked("digits-vit", 0.35, "random", 3),
        Asked("digits-vit", 0.75, "tome", 0),
        Asked("world-llava", 0.5, "random@projector", 2, 4),
    ):
        mine = runs[asked.run != "digits-vit"]
        link = link_of(mine, asked, "http://here/")
        assert link.startswith("http://here/?run=")
        query = dict(parse_qsl(link.partition("?")[2]))
        assert read_link(runs, query) == (asked, "")
    best = link_of(run, start(run))
    assert "method=evit" in best, "by its name, which stays when rows are made again"


def test_a_link_without_anything_is_the_pages_own_choice(run: Run) -> None:
    assert read_link([run], {}) == (start(run), "")
    assert read_link([run], {"__theme": "dark", "method": "best"}) == (start(run), "")
    assert read_link([run], {"budget": "0.350"}) == (replace(start(run), budget=0.35), "")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"run": "<b>"}, "run=<b>, which is not there; there are: digits-vit"),
        ({"budget": "0.4"}, "budget=0.4, which is not there; there are: 0.75, 0.5, 0.35"),
        ({"budget": "nan"}, "budget=nan"),
        ({"budget": "much"}, "budget=much"),
        (
            {"method": "pixelprune"},
            "method=pixelprune, which is not there; there are: best, evit, tome, random, pitome",
        ),
        ({"budget": "0.35", "method": "pitome"}, "there are: best, tome, evit, random"),
        ({"picture": "-1"}, "picture=-1, which is not there; there are: 0, 1, 2, 3, 4, 5"),
        ({"picture": "9" * 5000}, "picture=999"),
        ({"question": "7"}, "question=7"),
        ({"question": "%00<script>"}, "question=%00<script>"),
        ({"buget": "0.35"}, "the link has buget, which means nothing here; a link has: run, budget, method"),
        ({"budget": "2"}, "In its place stands what the page opens with."),
    ],
)
def test_a_wrong_link_is_told_what_there_is(run: Run, query: dict[str, str], words: str) -> None:
    asked, wrong = read_link([run], query)
    assert words in wrong
    assert len(wrong) < 300
    assert asked == replace(start(run), budget=0.35 if query.get("budget") == "0.35" else 0.5)


def test_every_name_that_is_offered_is_there() -> None:
    assert all(hasattr(overview, name) for name in overview.__all__)
