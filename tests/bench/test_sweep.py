from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_task import BASE, FakeTask, cost

import tokenreduce as tr
from tokenreduce.bench import runs
from tokenreduce.bench.methods import split_methods
from tokenreduce.bench.runs import load_run
from tokenreduce.bench.sweep import Point, Solver, Watch, points, sweep
from tokenreduce.bench.task import Task
from tokenreduce.common.words import plain
from tokenreduce.core.budget import BudgetError
from tokenreduce.core.reducer import Reducer

TESTS = Path(__file__).parents[1]


class Ear(Watch):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.planned: list[tuple[int, int]] = []
        self.ended: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def plan(self, total: int, done: int) -> None:
        self.planned.append((total, done))

    def end(self, point: Point, row: dict) -> None:
        self.ended.append(point.id)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_the_fake_is_a_task() -> None:
    assert isinstance(FakeTask(), Task)


# -- what is measured
def test_order_and_baselines(tmp_path: Path) -> None:
    run = sweep(FakeTask(), tmp_path, budgets=(0.5, 0.75))
    each = ["random", "uniform", "resize", "pitome", "tome"]
    assert [r["id"] for r in run.rows] == ["unreduced", *(f"{m}@0.75" for m in each), *(f"{m}@0.5" for m in each)]
    assert lines(tmp_path) == run.rows
    assert run.missing == []
    assert run.errors == []


def test_baselines_come_along_when_methods_are_named(tmp_path: Path) -> None:
    run = sweep(FakeTask(), tmp_path, methods=["tome", "random"], budgets=(0.5,))
    assert [r["method"] for r in run.rows] == ["unreduced", "random", "uniform", "resize", "tome"]


def test_what_has_no_budget_is_measured_as_it_is(tmp_path: Path) -> None:
    rows = sweep(FakeTask(), tmp_path, methods=["tome:keep=0.7", "pitome"], budgets=(0.5,)).rows
    assert not any(r.get("error") for r in rows)
    (fixed,) = (r for r in rows if r["method"] == "tome")
    assert fixed["spec"] == "tome:keep=0.7"
    assert fixed["budget"] == pytest.approx(fixed["share"], abs=0.001)
    assert f"random@{fixed['budget']}" in [r["id"] for r in rows]
    assert [r["budget"] for r in rows if r["method"] == "pitome"] == [0.5]


def test_rows_of_one_budget_cost_the_same(tmp_path: Path) -> None:
    run = sweep(FakeTask(), tmp_path, budgets=(0.75, 0.5, 0.35))
    for row in run.rows[1:]:
        if row["method"] != "resize":
            assert row["share"] == pytest.approx(row["budget"], abs=0.003)
            assert row["notes"] == (["clamped"] if row["method"] == "pitome" else [])
        assert row["spec"].startswith(f"{row['method']}:keep=0.")
        assert tr.get_method(row["spec"]).keep == tr.Reducer.from_json(row["settings"][0]).keep
    assert run.rows[0]["share"] == 1.0
    assert run.rows[0]["spec"] == ""


def test_a_method_in_steps_takes_the_nearest_and_says_so(tmp_path: Path) -> None:
    # resize of the fake costs 0.1 + 0.9 k for k in tenths: 0.46, 0.55 and 0.37, 0.28 are what it has
    rows = {r["id"]: r for r in sweep(FakeTask(), tmp_path, methods=[], budgets=(0.5, 0.36)).rows}
    assert rows["resize@0.5"]["flops"] == 460
    assert "46.0 %" in rows["resize@0.5"]["notes"][0]
    assert rows["resize@0.36"]["flops"] == 370
    assert rows["resize@0.36"]["notes"] == []


def test_an_unreachable_budget_takes_the_end(tmp_path: Path) -> None:
    rows = sweep(FakeTask(), tmp_path, methods=["pitome"], budgets=(0.2, 0.1)).rows
    row = rows[-1]
    assert row["method"] == "pitome"
    assert row["share"] == pytest.approx(0.3, abs=0.002)
    assert row["notes"] == [
        "cannot reach 10 % of the FLOPs; 30.1 % is the nearest that its settings allow", "clamped",
    ]  # fmt: skip


def test_equal_settings_are_measured_once(tmp_path: Path) -> None:
    task = FakeTask()
    rows = {r["id"]: r for r in sweep(task, tmp_path, methods=["pitome"], budgets=(0.2, 0.1)).rows}
    assert task.measured.count("pitome") == 1
    first, second = rows["pitome@0.2"], rows["pitome@0.1"]
    assert second["same_as"] == "pitome@0.2"
    assert "same_as" not in first
    assert (second["budget"], second["top1"], second["spec"]) == (0.1, first["top1"], first["spec"])
    assert [n for n in second["notes"] if "cannot reach" in n] == [
        "cannot reach 10 % of the FLOPs; 30.1 % is the nearest that its settings allow"
    ]


def test_r_takes_over_where_keep_does_not_reach(tmp_path: Path) -> None:
    # The fake's ToMe costs 1000 - 40 r; keep alone ends at 301. Of the equally near r=22 and r=23 the milder is taken.
    rows = {r["id"]: r for r in sweep(FakeTask(), tmp_path, methods=["tome"], budgets=(0.5, 0.2, 0.1)).rows}
    assert rows["tome@0.5"]["spec"].startswith("tome:keep=")
    assert rows["tome@0.2"]["spec"] == "tome:r=20"
    assert rows["tome@0.1"]["spec"] == "tome:r=22"
    with_r = Solver(FakeTask()).solve("tome:prop_attn=false", 0.2)[0]
    assert with_r == tr.ToMe(r=20, prop_attn=False)


def test_solver_remembers_across_budgets() -> None:
    task = FakeTask()
    solver = Solver(task)
    first, reached = solver.solve("tome", 0.5)
    assert abs(cost((first,)) / BASE - 0.5) <= 0.002
    assert reached == cost((first,)) / BASE
    used = task.evaluations
    assert solver.solve("tome", 0.5) == (first, reached)
    assert task.evaluations == used
    assert used <= 8


def test_solver_takes_settings_and_finds_odd_shapes() -> None:
    class Jagged(FakeTask):
        def flops(self, reducers):
            keep = reducers[0].keep if reducers else 1.0
            return round(1000 * (keep + 0.05 * ((keep * 20) % 1 - 0.5) * (keep < 1)))

    found, reached = Solver(Jagged()).solve("tome:prop_attn=false", 0.4)
    assert found.prop_attn is False
    assert abs(reached - 0.4) <= 0.01


def test_solver_searches_above_what_a_method_always_keeps() -> None:
    class Fixed(FakeTask):
        def flops(self, reducers: Sequence[Reducer]) -> int:
            if reducers and self.least > cost(reducers):
                raise BudgetError("the budget is below what always stays; give a larger keep")
            return super().flops(reducers)

        least = 300

    assert abs(Solver(Fixed()).solve("tome", 0.5)[1] - 0.5) <= 0.002
    assert 0.3 <= Solver(Fixed()).solve("tome", 0.1)[1] <= 0.32
    Fixed.least = 2 * BASE
    with pytest.raises(BudgetError):
        Solver(Fixed()).solve("tome", 0.5)


def test_solver_needs_a_free_keep() -> None:
    solver = Solver(FakeTask())
    with pytest.raises(ValueError, match=r"fixes keep.*--reduce"):
        solver.solve("tome:keep=0.5", 0.5)
    with pytest.raises(ValueError, match="keep"):
        solver.solve("tome:r=3", 0.5)


def test_explicit_specs_get_baselines_at_their_own_cost(tmp_path: Path) -> None:
    run = sweep(FakeTask(), tmp_path, reduce=["tome:r=10", "tome:r=4+pitome:keep=0.9"])
    assert [r["id"] for r in run.rows] == [
        "unreduced",
        "random@0.6", "uniform@0.6", "resize@0.6", "tome:r=10",
        "random@0.781", "uniform@0.781", "resize@0.781", "tome:r=4+pitome:keep=0.9",
    ]  # fmt: skip
    assert run.rows[4]["flops"] == 600
    assert run.rows[8]["method"] == "tome+pitome"
    assert [json.loads(s)["method"] for s in run.rows[8]["settings"]] == ["tome", "pitome"]


def test_an_explicit_spec_joins_a_budget_that_it_hits() -> None:
    task = FakeTask()
    got = points(task, Solver(task), ["tome"], (0.75, 0.6), ["tome:r=10"])
    assert [(p.id, p.budget) for p in got][-1] == ("tome:r=10", 0.6)
    assert sum(p.method == "random" for p in got) == 2


def test_wildcards_and_settings_in_methods() -> None:
    task = FakeTask()
    got = points(task, Solver(task), ["to*:prop_attn=false"], (0.5,))
    assert "tome:prop_attn=false@0.5" in [p.id for p in got]
    assert split_methods("tome:prop_attn=false,inflect=0.5,pi*, evit") == [
        "tome:prop_attn=false,inflect=0.5", "pi*", "evit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"budgets": (0.0,)}, "budget"),
        ({"budgets": (1.5,)}, "budget"),
        ({"methods": ["tomee"]}, "tome"),
        ({"methods": ["zz*"]}, "zz"),
        ({"methods": ["tome:q=1"]}, "tome has no setting"),
        ({"reduce": ["tome:keep=0"]}, "keep"),
        ({"reduce": [""]}, "names no method"),
    ],
)
def test_bad_requests_fail_before_any_measuring(tmp_path: Path, settings: dict, word: str) -> None:
    task = FakeTask()
    with pytest.raises(ValueError, match=word):
        sweep(task, tmp_path, **settings)
    assert task.measured == []


# -- continuing
def test_a_complete_run_is_not_measured_again(tmp_path: Path) -> None:
    first = sweep(FakeTask(), tmp_path, budgets=(0.5,))
    task, ear = FakeTask(), Ear()
    again = sweep(task, tmp_path, budgets=(0.5,), watch=ear)
    assert task.measured == []
    assert again.rows == first.rows
    assert ear.said == [f"6 of 6 rows are there already in {tmp_path}"]
    assert ear.planned == [(6, 6)]


def test_interrupt_leaves_whole_rows_and_the_rest_follows(tmp_path: Path) -> None:
    task = FakeTask()
    task.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        sweep(task, tmp_path, budgets=(0.5,))
    assert [r["id"] for r in lines(tmp_path)] == ["unreduced", "random@0.5", "uniform@0.5"]
    assert load_run(tmp_path).missing == ["resize@0.5", "pitome@0.5", "tome@0.5"]
    rest, ear = FakeTask(), Ear()
    run = sweep(rest, tmp_path, budgets=(0.5,), watch=ear)
    assert rest.measured == ["resize", "pitome", "tome"]
    assert ear.said == [f"3 of 6 rows are there already in {tmp_path}"]
    assert ear.ended == ["resize@0.5", "pitome@0.5", "tome@0.5"]
    assert len(run.rows) == len(lines(tmp_path)) == 6


KILLED = """
import sys
from collections.abc import Sequence
from pathlib import Path
sys.path.insert(0, {tests!r})
from fake_task import FakeTask
from tokenreduce.bench.sweep import sweep
task = FakeTask()
task.kill_at = 2
sweep(task, Path({out!r}), budgets=(0.5,))
"""


def test_a_killed_run_continues(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(TESTS), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [r["id"] for r in lines(tmp_path)] == ["unreduced", "random@0.5"]
    rest = FakeTask()
    run = sweep(rest, tmp_path, budgets=(0.5,))
    assert rest.measured == ["uniform", "resize", "pitome", "tome"]
    assert run.missing == []


def test_a_half_written_line_is_repaired_and_said(tmp_path: Path) -> None:
    whole = sweep(FakeTask(), tmp_path, budgets=(0.5,))
    file = tmp_path / "rows.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw[:-25])
    assert "cut off" in load_run(tmp_path).repaired
    assert file.read_bytes() == raw[:-25]  # reading changes nothing
    rest, ear = FakeTask(), Ear()
    run = sweep(rest, tmp_path, budgets=(0.5,), watch=ear)
    assert "cut off" in ear.said[0]
    assert "measured again" in ear.said[0]
    assert ear.said[1].startswith("5 of 6 rows")
    assert rest.measured == ["tome"]
    assert [r["id"] for r in lines(tmp_path)] == [r["id"] for r in whole.rows]
    assert run.missing == []


def test_a_row_without_line_end_is_kept(tmp_path: Path) -> None:
    sweep(FakeTask(), tmp_path, budgets=(0.5,))
    file = tmp_path / "rows.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    rest, ear = FakeTask(), Ear()
    sweep(rest, tmp_path, budgets=(0.5,), watch=ear)
    assert "kept" in ear.said[0]
    assert rest.measured == []
    assert file.read_bytes() == raw


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    sweep(FakeTask(), tmp_path, budgets=(0.5,))
    file = tmp_path / "rows.jsonl"
    text = file.read_text().splitlines()
    text[2] = text[2][:20]
    file.write_text("\n".join(text) + "\n")
    with pytest.raises(ValueError, match=r"line 3 .*--fresh"):
        sweep(FakeTask(), tmp_path, budgets=(0.5,))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    sweep(FakeTask(limit=100), tmp_path, budgets=(0.5,))
    before = (tmp_path / "rows.jsonl").read_bytes()
    task = FakeTask(limit=200, data="other")
    with pytest.raises(ValueError, match=r"limit: 100 there, 200 now") as caught:
        sweep(task, tmp_path, budgets=(0.5,))
    assert "data: none there, other now" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert "--out" in str(caught.value)
    assert task.prepared == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    sweep(task, tmp_path, budgets=(0.5,), fresh=True)
    assert load_run(tmp_path).info["settings"]["limit"] == 200
    assert len(lines(tmp_path)) == 6


def test_other_hardware_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(FakeTask(), tmp_path, budgets=(0.5,))
    monkeypatch.setattr(runs, "_cpu", lambda: "Abacus 3000")
    with pytest.raises(ValueError, match=r"hardware.cpu: .* there, Abacus 3000 now"):
        sweep(FakeTask(), tmp_path, budgets=(0.5,))


def test_points_may_be_added_but_not_left_out(tmp_path: Path) -> None:
    sweep(FakeTask(), tmp_path, methods=["tome"], budgets=(0.5,))
    task = FakeTask()
    run = sweep(task, tmp_path, methods=["tome", "pitome"], budgets=(0.5, 0.75))
    assert task.measured == ["random", "uniform", "resize", "tome", "pitome", "pitome"]
    assert [r["id"] for r in run.rows][:3] == ["unreduced", "random@0.75", "uniform@0.75"]
    with pytest.raises(ValueError, match=r"pitome@0.5.*--fresh"):
        sweep(FakeTask(), tmp_path, methods=["tome"], budgets=(0.5, 0.75))
    assert len(load_run(tmp_path).rows) == 11


def test_fresh_removes_only_what_is_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    sweep(FakeTask(), tmp_path, budgets=(0.5,))
    (tmp_path / "report.html").write_text("old")
    task = FakeTask()
    sweep(task, tmp_path, budgets=(0.5,), fresh=True)
    assert len(task.measured) == 6
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "report.html").exists()


def test_rows_without_run_json_are_refused(tmp_path: Path) -> None:
    sweep(FakeTask(), tmp_path, budgets=(0.5,))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="--fresh"):
        sweep(FakeTask(), tmp_path, budgets=(0.5,))


# -- errors
def test_a_failing_point_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    task = FakeTask()
    task.fail = ("pitome",)
    run = sweep(task, tmp_path, budgets=(0.75, 0.5))
    assert [r["id"] for r in run.errors] == ["pitome@0.75", "pitome@0.5"]
    assert run.errors[0]["error"] == "RuntimeError: pitome went wrong\nsecond line"
    assert "went wrong" in run.errors[0]["traceback"]
    assert len(run.good) == 9
    better, ear = FakeTask(), Ear()
    run = sweep(better, tmp_path, budgets=(0.75, 0.5), watch=ear)
    assert better.measured == ["pitome", "pitome"]
    assert "9 of 11 rows" in ear.said[0]
    assert "2 with an error" in ear.said[0]
    assert run.errors == []
    assert len(run.rows) == 11
    assert load_run(tmp_path).errors == []


def test_a_spec_that_fails_while_counting_is_a_row(tmp_path: Path) -> None:
    class Picky(FakeTask):
        def flops(self, reducers):
            if any(r.name == "tome" for r in reducers):
                raise RuntimeError("no keys here")
            return super().flops(reducers)

    run = sweep(Picky(), tmp_path, reduce=["tome:r=3"])
    assert [r["id"] for r in run.rows] == ["unreduced", "tome:r=3"]
    assert run.errors[0]["error"] == "RuntimeError: no keys here"


def test_without_the_unreduced_model_there_is_no_sweep(tmp_path: Path) -> None:
    class Broken(FakeTask):
        def measure(self, reducers):
            raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        sweep(Broken(), tmp_path, budgets=(0.5,))
    assert lines(tmp_path) == []


def test_problems_reach_the_run(tmp_path: Path) -> None:
    class Holes(FakeTask):
        def measure(self, reducers):
            self.problems = [{"path": "a.jpg", "reason": "truncated"}]
            return super().measure(reducers)

    sweep(Holes(), tmp_path, budgets=(0.5,))
    assert load_run(tmp_path).info["problems"] == [{"path": "a.jpg", "reason": "truncated"}]
    sweep(FakeTask(), tmp_path, budgets=(0.5,))  # nothing left to measure: what was found stays
    assert len(load_run(tmp_path).info["problems"]) == 1


@pytest.mark.parametrize("place", ["file/run", "/proc/tokenreduce-run"])
def test_unwritable_output_fails_before_computing(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    task = FakeTask()
    with pytest.raises(OSError, match=r"cannot write to .*--out"):
        sweep(task, tmp_path / place, budgets=(0.5,))
    assert task.prepared == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_fails_before_computing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write"):
        sweep(FakeTask(), tmp_path, budgets=(0.5,))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")

    class Nested(FakeTask):
        def prepare(self) -> None:
            with pytest.raises(OSError, match="another process is writing"):
                sweep(FakeTask(), tmp_path, budgets=(0.5,))
            super().prepare()

    task = Nested()
    sweep(task, tmp_path, budgets=(0.5,))
    assert task.prepared == 1


def test_load_run_says_what_a_folder_lacks(tmp_path: Path) -> None:
    sweep(FakeTask(), tmp_path / "a", budgets=(0.5,))
    with pytest.raises(FileNotFoundError, match="run folders in it: a"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenreduce bench"):
        load_run(tmp_path / "nothing")
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_run(tmp_path / "a")


def test_plain_makes_json() -> None:
    import numpy as np
    import torch

    got = plain({"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": (1, float("nan")), "d": Path("x"), "e": True})
    assert json.loads(json.dumps(got)) == {"a": 0.5, "b": [1, 2], "c": [1, None], "d": "x", "e": True}


def test_a_run_that_failed_before_its_first_row_is_in_nobodys_way(tmp_path: Path) -> None:
    class Broken(FakeTask):
        def prepare(self) -> None:
            raise ValueError("no such data")

    with pytest.raises(ValueError, match="no such data"):
        sweep(Broken(data="wrong"), tmp_path, methods=["tome"], budgets=(0.5,))
    result = sweep(FakeTask(data="right"), tmp_path, methods=["tome"], budgets=(0.5,))
    assert result.info["settings"]["data"] == "right"
    assert not result.errors
