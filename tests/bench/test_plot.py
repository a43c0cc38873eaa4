from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("plotly")

from tokenreduce.bench.plot import front, trade_axes, trade_plot
from tokenreduce.bench.runs import Run, read_run

ROWS = [
    {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "top1": 0.9, "share": 1.0, "speedup": 1.0},
    {"id": "tome@0.5", "method": "tome", "spec": "tome:keep=0.4", "budget": 0.5, "top1": 0.8, "share": 0.5,
     "speedup": 2},
    {"id": "evit@0.5", "method": "evit", "spec": "evit:keep=0.5", "budget": 0.5, "top1": 0.7, "share": 0.52},
    {"id": "random@0.5", "method": "random", "spec": "random:keep=0.5", "budget": 0.5, "top1": 0.3, "share": 0.5},
    {"id": "ats@0.5", "method": "ats", "spec": "", "budget": 0.5, "error": "ValueError: no"},
]  # fmt: skip


def written(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(written(tmp_path, ROWS))


def test_a_line_per_method_with_its_settings(run) -> None:
    figure = trade_plot(run)
    lines = {t.name: t for t in figure.data}
    assert set(lines) == {"unreduced", "tome", "evit", "random", "Pareto front"}
    assert list(lines["tome"].x) == [50.0]
    assert list(lines["tome"].y) == [80.0]
    assert "tome:keep=0.4" in lines["tome"].hovertext[0]
    assert lines["random"].line.color != lines["tome"].line.color
    assert list(zip(lines["Pareto front"].x, lines["Pareto front"].y, strict=True)) == [(50.0, 80.0), (100.0, 90.0)]


def test_the_clock_is_a_share_of_the_stock_models_time(run) -> None:
    assert set(trade_axes(run)) == {"cost", "flops", "clock", "speedup"}
    lines = {t.name: t for t in trade_plot(run, "clock").data}
    assert list(lines["tome"].x) == [50.0]
    assert list(lines["evit"].x) == []
    with pytest.raises(ValueError, match="against is one of cost, flops"):
        trade_plot(run, "money")


def test_names_and_settings_of_a_strangers_run_are_no_markup(tmp_path: Path) -> None:
    row = {**ROWS[1], "id": "<script>", "method": "<script>x</script>", "spec": "<img src=x>"}
    figure = trade_plot(read_run(written(tmp_path, [ROWS[0], row])))
    assert "<script>" not in figure.to_json()
    assert "<img" not in figure.to_json()


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], []),
        ([(2, 1)], [(2, 1)]),
        ([(1, 5), (1, 7), (2, 7), (3, 9), (2, 2)], [(1, 7), (3, 9)]),
    ],
)
def test_the_front_is_what_nothing_beats(points, best) -> None:
    assert front(points) == best


def test_rows_alone_are_a_run(run, tmp_path: Path) -> None:
    assert run.metric == "top1"
    assert run.axis.key == "share"
    assert len(run.good) == 4
    assert len(run.errors) == 1
    visual = [{**r, "accuracy": r.get("top1"), "visual_share": 0.3} for r in ROWS]
    other = read_run(written(tmp_path, visual, "visual.jsonl"))
    assert (other.metric, other.axis.key) == ("accuracy", "visual_share")
    info = tmp_path / "run.json"
    info.write_text(json.dumps({"metric": "top1", "settings": {"model": "m"}}))
    assert read_run(tmp_path / "visual.jsonl", info).info["settings"] == {"model": "m"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no row"),
        ("no json\n", "no row"),
        ('{"id": "a"}\n', "method, spec is missing"),
        ('{"id": "a", "method": "m", "spec": "m"}\n', "has an accuracy"),
        ('{"id": "a", "method": "m", "spec": "m", "top1": "x"}\n', "top1 of a is no number"),
        ("[1]\n[2]\n", "cannot be read"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_run(file)
