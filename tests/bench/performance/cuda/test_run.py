from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.performance.cuda import __main__ as command
from tokenreduce.bench.performance.cuda import cases, run
from tokenreduce.bench.performance.cuda.clock import Rehearsal, captured, lost, syncs, timed
from tokenreduce.bench.performance.cuda.ledger import BROKEN, Ledger, last_rows, missing
from tokenreduce.bench.performance.cuda.run import SECTIONS, Run, keys_of
from tokenreduce.bench.performance.shapes import build_packed

pytest.importorskip("transformers")
pytest.importorskip("timm")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with one test for a CUDA device, to be collected."""
    folder = tmp_path / "checkout" / "tests"
    folder.mkdir(parents=True)
    marked = "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
    (folder / "test_cuda.py").write_text(marked)
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr("tokenreduce.bench.performance.cuda.checks.FOLDERS", ("tests/test_cuda.py",))
    return tmp_path


def here(self: Run, name: str, until: float) -> int:
    run.measure_section(name, self.out, until, self.device, "eager", self.tiny)
    return 0


@pytest.mark.filterwarnings("ignore")
def test_the_dry_run_measures_every_row_and_shows_it(checkout, monkeypatch):
    """A method of each stage in both shapes; the slow test has all rows, what is compiled among them, each section in a
    process of its own."""
    monkeypatch.setattr(Run, "_child", here)
    monkeypatch.setattr(cases, "_STAGES", cases._STAGES[:3])
    monkeypatch.setattr(cases, "_SHARES", (0.25,))
    monkeypatch.setattr(run, "compiled", lambda tiny: [])
    made = CliRunner().invoke(command.app, ["run", "--tiny", "--out", str(checkout / "out")])
    assert made.exit_code == 0, made.output
    rows = {(row["section"], row["key"]): row for row in last_rows(checkout / "out" / "rows.jsonl")}
    bad = {key: row.get("error", row.get("why")) for key, row in rows.items() if row["status"] != "ok"}
    assert not bad
    promised = {(section, key) for section in SECTIONS for key in keys_of(section, True)}
    assert promised <= set(rows)
    page = (checkout / "out" / "performance-cuda.md").read_text()
    assert all(f"| {key} |" in page for section, key in promised if section != "tests")
    assert "A dry run with tiny shapes" in page
    assert "Not measured" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(t.count("|") > 8 for t in tables)
    tome = rows["encoders", "vit_tiny_patch16_224 batch 2 eager tome:r=2 sizes key"]
    assert tome["left"] == 17 - 4
    assert tome["flops"] > 1
    zipped = rows["languages", "llava-tiny eager visionzip at 25% (projector)"]
    assert zipped["visual"] == [9, 9.0]
    assert zipped["kv"][0] / zipped["kv"][1] == (36 + 8) / (9 + 8)
    torch.compiler.reset()


@pytest.mark.slow
def test_the_dry_run_in_processes_of_their_own(tmp_path):
    out, root = tmp_path / "out", Path(__file__).parents[4]
    command = [
        sys.executable,
        "-m",
        "tokenreduce.bench.performance.cuda",
        "--tiny",
        "--out",
        str(out),
        "--backend",
        "eager",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert made.returncode == 0, made.stderr
    for section in SECTIONS:
        assert not missing(out / "rows.jsonl", section, keys_of(section, True))
    bad = [row for row in last_rows(out / "rows.jsonl") if row["status"] != "ok"]
    assert not bad


def test_what_is_promised_exists():
    for case in [*cases.encoders(), *cases.compiled()]:
        if isinstance(case, cases.Encoder):
            assert tr.get_method(case.method).proportional == (case.sizes != "none")
    for case in cases.languages():
        assert tr.get_method(f"{case.method}:keep={case.keep}", case.stage).stage == case.stage
    keys = [case.key for case in (*cases.encoders(), *cases.languages(), *cases.compiled())]
    assert len(set(keys)) == len(keys)
    assert {case.batch for case in cases.encoders()} == {1, 64}


def test_qwen_has_its_size():
    shape, packed = cases.shape_of("qwen2.5-vl-7b")
    assert packed
    model = build_packed(shape, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- rows -------------------------------------------------------------------------------------------------------------
def fail():
    raise RuntimeError("no kernel for this\nand more")


def test_rows_are_written_at_once_and_errors_are_rows(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []
    ledger = Ledger(path, "encoders", time.time() + 100)
    ledger.run("a", lambda: seen.append(path.read_text()) or {"n": 1})
    assert json.loads(seen[0])["status"] == "begun"
    ledger.run("b", fail)
    ledger.run("c", lambda: {"n": 2})
    ledger.run("d", lambda: {"n": 3}, "long", needs=1000.0)
    rows = {row["key"]: row for row in last_rows(path)}
    assert rows["b"]["error"] == "RuntimeError: no kernel for this"
    assert rows["c"]["n"] == 2
    assert rows["d"]["status"] == "skipped"
    assert "100" in rows["d"]["why"] or "99" in rows["d"]["why"]
    again = Ledger(path, "encoders", time.time() + 100)
    again.run("a", fail)
    assert {row["key"]: row["status"] for row in last_rows(path)}["a"] == "ok"
    with path.open("a") as file:
        file.write('{"section": "encoders", "key": "e", "sta')
    assert missing(path, "encoders", "abcde") == ["e"]


def test_a_row_takes_as_long_as_the_longest_of_its_kind(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "rows.jsonl", "x", time.time() + 100)
    ledger.spent["slow"] = 1000.0
    ledger.run("a", dict, "slow", needs=1.0)
    ledger.run("b", dict, "fast", needs=1.0)
    assert [row["status"] for row in last_rows(ledger.path)] == ["skipped", "ok"]


def test_a_lost_device_ends_the_process(tmp_path):
    ledger = Ledger(tmp_path / "rows.jsonl", "x", time.time() + 100, lambda: True)
    with pytest.raises(SystemExit) as ended:
        ledger.run("a", fail)
    assert ended.value.code == BROKEN
    assert last_rows(ledger.path)[0]["status"] == "error"


# -- processes --------------------------------------------------------------------------------------------------------
def a_run(tmp_path: Path) -> Run:
    return Run(tmp_path, time.time() + 100, "cpu", True, "eager")


def test_a_section_goes_on_behind_a_process_that_died(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "keys_of", lambda section, tiny: ["a", "b", "c"])
    codes = []

    def dies(self, name, until):
        ledger = Ledger(self.rows, name, until)
        if not codes:
            ledger.run("a", dict)
            ledger.note("b", "begun")
        else:
            ledger.run("b", fail)  # not again
            ledger.run("c", dict)
        codes.append(-9 if not codes else 0)
        return codes[-1]

    monkeypatch.setattr(Run, "_child", dies)
    one = a_run(tmp_path)
    one.section("encoders", time.time() + 50)
    assert codes == [-9, 0]
    assert [(row["key"], row["status"]) for row in last_rows(one.rows)] == [("a", "ok"), ("b", "error"), ("c", "ok")]
    assert last_rows(one.rows)[1]["error"] == "ended the process (-9)"


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(Run, "_child", lambda self, name, until: codes.append(1) or 1)
    one = a_run(tmp_path)
    one.section("tests", time.time() + 50)
    assert codes == [1]
    assert [row["why"] for row in last_rows(one.rows)] == ["the process of its section ended with 1"]


def test_rows_that_the_time_is_too_short_for_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0.1)
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(sleeper))
    one, began = a_run(tmp_path), time.monotonic()
    assert one._child("encoders", time.time()) is None
    assert time.monotonic() - began < 30
    Ledger(one.rows, "encoders", 0).note(keys_of("encoders", True)[0], "begun")
    one._blame("encoders", None)
    one.section("encoders", time.time())
    rows = last_rows(one.rows)
    assert [row["key"] for row in rows] == keys_of("encoders", True)
    assert rows[0]["error"].startswith("killed")
    assert all(row["why"] == "the time of its section was over" for row in rows[1:])


def test_a_killed_run_has_a_page(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Ledger(out / "rows.jsonl", "run", 0).note("conditions", "ok", command="make gpu", about="A device.", tiny=False)
    ledger = Ledger(out / "rows.jsonl", "encoders", 0)
    ledger.note("one", "error", error="a | b")
    ledger.note("two", "begun")
    made = CliRunner().invoke(command.app, ["page", str(out)])
    assert made.exit_code == 0, made.output
    page = (out / "performance-cuda.md").read_text()
    assert "| encoders | one | a \\| b |" in page
    assert "| encoders | two | the run ended while it was measured |" in page
    assert "dry run" not in page
    assert CliRunner().invoke(command.app, ["page", str(tmp_path)]).exit_code == 2


def test_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").touch()
    for args, said in (
        (["--sections", "tests,video"], "encoders"),
        (["--device", "gpu"], "cuda or cuda:N"),
        ([], "--tiny"),
        (["--tiny", "--out", str(tmp_path / "there")], "already"),
        (["--tiny", "--out", str(tmp_path / "new"), "--began", "1000"], "--minutes"),
    ):
        made = CliRunner().invoke(command.app, ["run", *args], terminal_width=200)
        assert made.exit_code == 2
        assert said in made.output, made.output


# -- the clock --------------------------------------------------------------------------------------------------------
def test_a_capture_runs_aside_first_and_once_inside():
    calls, inside = [], []

    class Watched(Rehearsal):
        def graph(self, graph):
            inside.append(len(calls))
            return super().graph(graph)

        class CUDAGraph:
            def replay(self):
                calls.append("replay")

    replay = captured(lambda: calls.append("run"), Watched())
    assert inside == [3]
    assert calls == ["run"] * 4
    replay()
    assert calls[-1] == "replay"


def test_times_are_those_of_one_call():
    calls = {"a": 0, "b": 0}

    def counting(name):
        calls[name] += 1

    got = timed({"a": lambda: counting("a"), "b": lambda: (counting("b"), time.sleep(0.02))}, 0.2, "cpu")
    assert len(got["a"].times) == len(got["b"].times) >= 3
    assert got["b"].median >= 0.02
    assert calls["a"] > calls["b"], "what is short is called several times between two looks at the clock"
    assert len(timed({"a": lambda: None}, 0.0, "cpu")["a"].times) == 1
    assert syncs(lambda: None, "cpu") is None
    assert not lost("cpu")


def test_waits_are_counted_by_what_torch_says_of_them(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        for text in (
            "called a synchronizing CUDA operation",
            "something else",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(text, stacklevel=1)

    assert syncs(waits, "cuda") == 2
    assert modes == ["default", "warn", "default"]


def test_a_device_that_cannot_compute_is_lost(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert lost("cuda")


def test_the_page_says_which_card_it_was(monkeypatch):
    card = SimpleNamespace(name="Card 9000", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = command._conditions("cuda")
    assert said.startswith("Card 9000, 80 GiB, CUDA 13.0; python")
