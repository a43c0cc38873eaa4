from __future__ import annotations

import csv
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_task import FakeTask
from PIL import Image
from rich.console import Console

from tokenreduce.bench import picture
from tokenreduce.bench.columns import compact, notes, ordered
from tokenreduce.bench.picture import COLOURS, curves, pareto, spread, style
from tokenreduce.bench.report import rebuild, table, write_csv
from tokenreduce.bench.runs import Run, load_run
from tokenreduce.bench.sweep import sweep


class Task(FakeTask):
    """A fake with what a report must get right: a failed row, problems, notes, and text that HTML must escape."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.fail = ("tome",)
        self.problems = [{"path": f"<dir>/{i}.jpg", "reason": "cut & short"} for i in range(7)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return sweep(Task(), tmp_path / "one", budgets=(0.5, 0.75), command="tokenreduce bench fake --budgets '0.5,0.75'")


def text(runs: list[Run], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(runs, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_are_ordered_by_budget_then_metric(run: Run) -> None:
    got = [(r["id"], r.get("top1")) for r in ordered(run)]
    assert got[0][0] == "unreduced"
    for start, budget in ((1, 0.75), (6, 0.5)):
        group = ordered(run)[start : start + 5]
        assert {r["budget"] for r in group} == {budget}
        assert group[-1]["id"] == f"tome@{budget}"  # the failed one
        meeting = [r["top1"] for r in group[:-1] if abs(r["share"] - budget) <= 0.03]
        assert meeting == sorted(meeting, reverse=True)
    assert got[9][0] == "resize@0.5"  # it costs 46 %: behind those that meet the budget


def test_table_shows_results_baselines_and_errors(run: Run) -> None:
    shown = text([run], 200)
    for word in (
        "unreduced",
        "75 %",
        "50 %",
        "FLOPs %",
        "speed-up",
        "top-1 %",
        "90.0 ±1.0",
        "50>40>37",
        "error",
        "*46.0",
    ):
        assert word in shown, word
    for name in ("random", "uniform", "resize"):
        assert len(re.findall(rf"{name}:keep=0\.\d+°", shown)) == 2
    assert not re.search(r"pitome:keep=0\.\d+°", shown)
    assert "° baseline; * other FLOPs than the budget" in shown


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_narrow_tables_drop_columns_and_name_them(run: Run, width: int) -> None:
    shown = text([run], width)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert "top-1 %" in shown
    assert "FLOPs %" in shown
    whole = text([run], 300)
    assert "not shown here" not in whole
    if width < 140:
        missing = shown.replace("\n", " ").partition("rows.csv:")[2]
        for head in ("GMACs", "end"):
            assert (head in shown.splitlines()[0]) != (head in missing)


def test_notes_tell_everything(run: Run) -> None:
    lines = notes(run)
    assert any("resize:keep=" in x and "46.0 % is the nearest" in x for x in lines)
    assert "tome@0.5 failed: RuntimeError: tome went wrong" in lines
    assert any(x.startswith("7 inputs could not be used") for x in lines)
    assert sum("cut & short" in x for x in lines) == 7
    brief = notes(run, brief=True)
    assert sum("cut & short" in x for x in brief) == 5
    assert any("2 more" in x for x in brief)


def test_compact() -> None:
    assert compact([50]) == "50"
    assert compact([50, 50, 50]) == "50"
    assert compact([50, 46, 42, 38]) == "50>46>42>38"
    assert compact([50, 46, 42, 38, 34, 34]) == "50>46>..>34"
    assert compact([50, 50, 46.5], whole=True) == "50 50 46.5"


def test_csv_has_every_scalar_unrounded(run: Run, tmp_path: Path) -> None:
    with write_csv([run], tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    by = {r["id"]: r for r in rows}
    mine = next(r for r in run.rows if r["id"] == "pitome@0.5")
    assert float(by["pitome@0.5"]["top1"]) == mine["top1"]
    assert by["pitome@0.5"]["tokens"] == "50 40 25"
    assert by["pitome@0.5"]["odd_number"] == "7"  # a key that no column knows
    assert by["pitome@0.5"]["top1_stderr"] == "0.01"
    assert by["pitome@0.5"]["notes"] == "clamped"
    assert by["tome@0.5"]["error"].startswith("RuntimeError: tome went wrong")
    assert by["tome@0.5"]["top1"] == ""
    assert "traceback" not in rows[0]


class Page(HTMLParser):
    """Collects tags, and fails on what an XML-minded reader would stumble over."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_html_is_whole_and_self_contained(run: Run) -> None:
    _, files = rebuild([run.folder])
    source = files["html"].read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert page.open == []
    words = " ".join(page.words)
    for word in (
        "unreduced", "pitome:keep=", "50 40 25", "<dir>/6.jpg: cut & short", "tome went wrong", "second line",
        "tokenreduce bench fake --budgets '0.5,0.75'", "tokenreduce report", "torch", "cpu", "odd_number", "model",
    ):  # fmt: skip
        assert word in words, word
    loaded = [
        a for tag, a in page.tags if tag in ("script", "link", "img", "iframe") and (a.get("src") or a.get("href"))
    ]
    assert loaded == []
    assert "Plotly.newPlot" in source
    assert source.count("Plotly.newPlot(") >= 2  # against FLOPs and against the clock
    assert len(source) > 3_000_000  # plotly itself is inside
    rows = [a for tag, a in page.tags if tag == "tr" and "base" in (a.get("class") or "")]
    assert len(rows) == 6


def test_png_shows_every_line(run: Run, tmp_path: Path) -> None:
    path = pareto([run], tmp_path / "p.png")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for name, (colour, _, _) in style(curves(run)).items():
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(1) < 3).sum() > 30, name


def test_lines_and_styles(run: Run) -> None:
    lines = curves(run)
    assert set(lines) == {"unreduced", "random", "uniform", "resize", "pitome"}  # tome has failed rows only
    assert [r["budget"] for r in lines["pitome"]] == [0.5, 0.75]
    styles = style([*lines, *(f"m{i}" for i in range(14))])
    assert styles["random"][1] == "dash"
    colours = [(c, m) for n, (c, _, m) in styles.items() if n not in ("random", "uniform", "resize")]
    assert len(set(colours)) == len(colours) > len(COLOURS)


@pytest.mark.parametrize(
    ("wanted", "gap"), [([0.5], 0.1), ([0.5, 0.5, 0.5], 0.1), ([0.9, 0.1, 0.11, 1.0, 0.99], 0.05), ([0.5] * 30, 0.1)]
)
def test_labels_spread(wanted: list[float], gap: float) -> None:
    got = spread(wanted, gap, 0.0, 1.0)
    assert all(-1e-9 <= g <= 1 + 1e-9 for g in got)
    rank = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [got[b] - got[a] for a, b in itertools.pairwise(rank)]
    assert all(g >= min(gap, 1 / max(1, len(wanted) - 1)) - 1e-9 for g in gaps)
    if len(wanted) == 1:
        assert got == wanted


def test_labels_stay_where_there_is_room() -> None:
    assert spread([0.8, 0.2, 0.5], 0.1, 0, 1) == pytest.approx([0.8, 0.2, 0.5])
    assert spread([], 0.1, 0, 1) == []


def test_several_runs_and_another_metric(run: Run, tmp_path: Path) -> None:
    class Other(FakeTask):
        name, metric = "talk", "accuracy"

        def measure(self, reducers):
            row = super().measure(reducers)
            row["accuracy"] = row.pop("top1")
            row["accuracy_stderr"] = row.pop("top1_stderr")
            return row

    sweep(Other(), tmp_path / "two", budgets=(0.5,))
    runs, files = rebuild([run.folder, tmp_path / "two"])
    assert {p.parent for p in files.values()} == {tmp_path / "report"}
    shown = text(runs, 200)
    assert "accuracy %" in shown
    assert "two" in shown
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["run"] for r in rows} == {"one", "two"}
    assert all(r["accuracy"] for r in rows if r["run"] == "two")
    with Image.open(files["png"]) as both, Image.open(rebuild([run.folder])[1]["png"]) as single:
        assert both.width == 2 * single.width


def test_the_axis_is_linear_from_the_lowest_to_the_highest() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture._scale(axes, [90.0, 88.0, 10.0], 100.0)
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [float(to_axes.transform((0, v))[1]) for v in (100.0, 90.0, 88.0, 10.0)]
    assert 0 < places[3] < 0.1 < 0.9 < places[0] < 1
    assert (places[1] - places[2]) / (places[1] - places[3]) == pytest.approx(2 / 80)


def test_a_panel_tells_its_finding_and_standard_errors(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = sweep(FakeTask(), tmp_path, methods=["tome"], budgets=(0.5,))
    axes = Figure().subplots()
    lines = curves(run)
    picture._panel(axes, run, lines, style(lines))
    assert axes.get_title(loc="left").replace("\n", " ").startswith("50 % of the FLOPs: tome keeps")
    assert len(axes.containers) == len(lines) - 1  # bars of all but the unreduced model
    assert axes.get_yscale() == "linear"
    assert "better" in [t.get_text() for t in axes.texts]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    task = FakeTask()
    task.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        sweep(task, tmp_path, budgets=(0.5,))
    runs, files = rebuild([tmp_path])
    assert "4 of 6 rows are still to be measured" in notes(runs[0])
    assert "4 still to be measured" in files["html"].read_text(encoding="utf-8")


def test_report_errors(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        rebuild([])
    with pytest.raises(FileNotFoundError, match="no run folder"):
        rebuild([tmp_path / "none"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*--out"):
        rebuild([run.folder], tmp_path / "file" / "x")
    task = FakeTask()
    task.interrupt_at = 0
    with pytest.raises(KeyboardInterrupt):
        sweep(task, tmp_path / "empty", budgets=(0.5,))
    with pytest.raises(ValueError, match="no row was measured yet"):
        rebuild([tmp_path / "empty"])


def test_a_missing_library_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenreduce\[bench\]'"):
        rebuild([run.folder])


def test_reading_a_report_changes_no_rows(run: Run) -> None:
    before = (run.folder / "rows.jsonl").read_bytes(), (run.folder / "run.json").read_bytes()
    rebuild([run.folder])
    assert before == ((run.folder / "rows.jsonl").read_bytes(), (run.folder / "run.json").read_bytes())
    assert load_run(run.folder).rows == run.rows
