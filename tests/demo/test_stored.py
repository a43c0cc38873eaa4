"""Rows that ship with the package: written compactly, read with an error that names the line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stored_rows

from tokenreduce.bench.runs import Run
from tokenreduce.demo import stored
from tokenreduce.demo.stored import main, stored_runs, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stored_rows.write(tmp_path / "stored")


@pytest.mark.parametrize("model", ["world-vit-2", "world-llava-2"])
def test_methods_of_the_second_world_differ(model: str) -> None:
    """At the smallest budget no two thirds of the methods that meet it are within one standard error of one."""
    (run,) = (r for r in stored_runs() if r.info["settings"]["model"] == model)
    least = min(r["budget"] for r in run.rows)
    met = [r for r in run.rows if r["budget"] == least and abs(r["share"] - least) < 0.03]
    assert len(met) >= 15
    for row in met:
        near = [r for r in met if abs(r["accuracy"] - row["accuracy"]) <= row["accuracy_stderr"]]
        assert len(near) < len(met) * 2 / 3, row["spec"]


def test_what_is_written_is_read(folder: Path) -> None:
    models = [run.info["settings"]["model"] for run in stored_runs(folder)]
    assert models == ["world-llava", "digits-vit"], "in the page's order"
    back, made = stored_runs(folder)[1], stored_rows.digits()
    assert back.rows == made.rows
    assert back.metric == "top1"
    assert back.axis == made.axis
    assert back.missing == []
    assert back.info["command"] == made.info["command"]
    assert back.info["settings"] == {"model": "digits-vit", "data": "digits", "split": "test", "limit": 500}


def test_only_what_the_page_needs_is_kept(tmp_path: Path) -> None:
    more = {"right": "01" * 500, "tokens": [50] * 6, "wall_s": 3.1, "found": None, "hard": 1 / 3}
    row = stored_rows.row("tome", 0.5, 2 / 3, notes=["a" * 300, "b\nc", "d"], **more)
    failed = {"id": "evit@0.5", "method": "evit", "spec": "evit", "budget": 0.5, "error": "ValueError: no"}
    run = stored_rows.run_of("digits-vit", "digits", "vision", "accuracy", [row, failed])
    (back,) = stored_runs(write_run(run, tmp_path).parent)
    assert [r["id"] for r in back.rows] == ["unreduced", "tome@0.5"]
    kept = back.rows[1]
    assert not {"right", "tokens", "wall_s", "found", "error"} & {*kept}
    assert (kept["accuracy"], kept["hard"]) == (0.66667, 0.33333)
    assert kept["notes"] == ["a" * 157 + "...", "b"]


@pytest.mark.parametrize(
    ("number", "line", "words"),
    [
        (1, "{}", "names no metric"),
        (1, '{"metric":"top1","settings":{}}', "names no model"),
        (1, '{"metric":"top1","settings":{"model":"m"}}', "names no axis"),
        (3, '{"id":"tome@0.5"', "Expecting"),
        (3, '["id"]', "a row has id, method, spec"),
        (3, '{"id":"a","method":"a","spec":"a","top1":0.5,"share":"x"}', "share is no number"),
        (3, '{"id":"a","method":"a","spec":"a"}', "a has no top1"),
    ],
)
def test_damage_is_told_with_its_line_and_the_fix(folder: Path, number: int, line: str, words: str) -> None:
    file = folder / "digits-vit.jsonl"
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"line {number} of .*digits-vit\.jsonl cannot be read \(.*{words}") as error:
        stored_runs(folder)
    assert "python -m tokenreduce.demo.stored RUN_FOLDER" in str(error.value)
    file.write_text(lines[0] if number > 1 else "")
    with pytest.raises(ValueError, match="holds no row"):
        stored_runs(folder)


def test_a_run_that_the_page_cannot_use_is_refused(tmp_path: Path) -> None:
    for model in ("hf:/some/folder", None):
        with pytest.raises(ValueError, match="no run of an embedded model"):
            write_run(Run(tmp_path, {"settings": {"model": model}}), tmp_path / "out")
    with pytest.raises(ValueError, match="no measured row"):
        write_run(Run(tmp_path, {"settings": {"model": "digits-vit"}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_reads_run_folders(tmp_path: Path, capsys) -> None:
    made = stored_rows.digits()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(made.info))
    (tmp_path / "run" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made.rows))
    main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert f"digits-vit.jsonl: {len(made.rows)} rows, " in capsys.readouterr().out
    assert len(stored_runs(tmp_path / "out")[0].rows) == len(made.rows)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "nothing")])
    assert end.value.code == 1
    assert "no run folder" in capsys.readouterr().err


def test_the_command_starts_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenreduce.demo.stored", "--help"], capture_output=True, text=True, env=os.environ
    )
    assert "tokenreduce bench ... --out" in " ".join(done.stdout.split())


def test_the_rows_of_the_package_can_be_read_and_are_small() -> None:
    runs = stored_runs()
    assert runs
    for run in runs:
        assert run.folder.stem == run.info["settings"]["model"]
        assert run.folder.stat().st_size <= stored.MOST_BYTES
        assert any(r["id"] == "unreduced" for r in run.good)
