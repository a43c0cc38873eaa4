"""Times and speed-ups that stand in one table agree with each other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from fake_task import FakeTask

from tokenreduce.bench.columns import KNOWN, cell
from tokenreduce.bench.report import rebuild, table
from tokenreduce.bench.sweep import sweep
from tokenreduce.bench.times import consistent, floor, speed_keys, within_noise
from tokenreduce.measure.timing import Speedup


def test_times_of_a_row_are_the_unreduced_ones_over_its_speedup() -> None:
    base = {"first_token_s": 0.1279, "images_per_s": 100.0, "seconds_per_image": 0.01, "tower_s": 0.05}
    row = {"first_token_s": 0.1386, "speedup": 1.1, "tower_s": 0.07, "tower_speedup": 0.5, "images_per_s": 90.0, "x": 1}
    made = consistent(row, base)
    assert made["first_token_s"] == pytest.approx(0.1279 / 1.1)
    assert made["images_per_s"] == pytest.approx(110)
    assert made["tower_s"] == pytest.approx(0.1)
    assert "seconds_per_image" not in made
    assert made["x"] == 1
    assert consistent(row, None) == row
    assert consistent({"top1": 1.0}, base) == {"top1": 1.0}


def test_noise_is_marked() -> None:
    sure, unsure = Speedup.of([1.2, 1.3, 1.25]), Speedup.of([0.9, 1.1, 1.2])
    assert not within_noise(speed_keys(sure))
    assert within_noise(speed_keys(unsure))
    assert within_noise({"speedup": 1.2, "speedup_low": 0.0, "speedup_high": None})  # one round
    assert not within_noise({"speedup": 1.0})  # a run of an earlier version says nothing
    column = KNOWN["speedup"]
    assert cell(speed_keys(sure), column) == "1.25x"
    assert cell(speed_keys(unsure), column) == "≈1.10x"


def test_the_floor_of_noise_is_the_unreduced_model_against_itself() -> None:
    base = speed_keys(floor(Speedup.of([1.02, 1.03, 1.08])))
    assert (base["speedup"], base["speedup_low"], base["speedup_high"]) == (1.0, 1.0, 1.08)
    assert cell({"id": "unreduced", **base}, KNOWN["speedup"]) == "1.00-1.08x"
    # Sure to be faster by its own rounds, but by less than the model differs from itself.
    inside, beyond = (consistent(speed_keys(Speedup.of([x - 0.01, x, x + 0.01])), base) for x in (1.05, 1.2))
    assert within_noise(inside)
    assert not within_noise(beyond)
    assert cell(inside, KNOWN["speedup"]) == "≈1.05x"
    assert (beyond["speedup_noise_low"], beyond["speedup_noise_high"]) == (1.0, 1.08)


class Timed(FakeTask):
    """Rounds of one row say 1.1x, and their medians lie beside each other as the opposite."""

    def measure(self, reducers):
        row = super().measure(reducers)
        speedup = Speedup.of([0.9, 1.1, 1.2]) if reducers else floor(Speedup.of([0.98, 1.0, 1.01]))
        return {**row, **speed_keys(speedup), "first_token_s": 0.1386 if reducers else 0.1279}


def test_a_report_never_contradicts_itself(tmp_path: Path) -> None:
    sweep(Timed(), tmp_path, methods=["tome"], budgets=(0.5,))
    runs, files = rebuild([tmp_path])
    rows = {r["method"]: r for r in csv.DictReader(files["csv"].open())}
    base = float(rows["unreduced"]["first_token_s"])
    for name, row in rows.items():
        assert base / float(row["first_token_s"]) == pytest.approx(float(row["speedup"])), name
    assert (rows["unreduced"]["speedup"], rows["tome"]["speedup_low"]) == ("1.0", "0.9")
    made = table(runs, 200)
    assert "≈ as fast within noise" in str(made.caption)
    shown = [str(c) for column in made.columns if str(column.header) == "speed-up" for c in column._cells]
    assert shown[0] == "0.98-1.01x"
    assert set(shown[1:]) == {"≈1.10x"}
    # A run that continues in another process has its reference in the file.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:1]))
    sweep(Timed(), tmp_path, methods=["tome"], budgets=(0.5,))
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["first_token_s"] for row in again[1:]] == pytest.approx([0.1279 / 1.1] * (len(again) - 1))
