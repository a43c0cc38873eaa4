"""``tokenreduce export``: the file is what the model is, any batch, and what cannot be right leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import images, tiny_vit
from torch import nn
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.cli import app
from tokenreduce.measure import exported
from tokenreduce.measure.exported import ExportDiffersError, export, runner

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_onnx_of_tome(tmp_path: Path) -> None:
    model, x, path = tiny_vit(), images(4), tmp_path / "vit.onnx"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = export(model, tr.parse("tome:r=3"), x, path, repeats=2)
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape[1:] == [3, 24, 24]
    assert isinstance(session.get_inputs()[0].shape[0], str)  # a name, so any number
    assert session.get_modelmeta().custom_metadata_map["tokenreduce"] == made.spec == "tome:r=3"
    with tr.patched(model, "tome:r=3"), torch.no_grad():
        for batch in (1, 7):
            got = session.run(None, {"images": images(batch).numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(got), model(images(batch)), rtol=1e-3, atol=1e-3)
    assert made.checked.batches == (4, 1, 3)
    assert 0 < made.checked.difference < 1e-3 * made.checked.scale
    assert made.speedup is not None
    assert made.seconds > 0
    assert made.bytes >= path.stat().st_size
    assert sorted(f.name for f in tmp_path.iterdir()) == ["vit.onnx"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_pt2_and_a_method_without_a_fixed_count(tmp_path: Path) -> None:
    model, x = tiny_vit(), images(3)
    made = export(model, tr.parse("ats"), x, tmp_path / "vit.pt2", form="pt2", repeats=0)
    assert made.speedup is None
    assert any("as many tokens as an image asks for" in note for note in made.notes)
    with tr.patched(model, "ats"), torch.no_grad():
        torch.testing.assert_close(runner(tmp_path / "vit.pt2", "pt2")(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_another_output_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vit.pt2"
    path.write_text("an earlier one")
    right = exported.runner

    def off(file, form):
        run = right(file, form)
        return lambda x: run(x) + (torch.arange(len(x)) == 2)[:, None] * 0.5

    monkeypatch.setattr(exported, "runner", off)
    with pytest.raises(ExportDiffersError, match="1 of 3 images come out otherwise"):
        export(tiny_vit(), tr.parse("tome:r=3"), images(3), path, form="pt2", repeats=0)
    assert path.read_text() == "an earlier one"
    assert [f.name for f in tmp_path.iterdir()] == ["vit.pt2"]


def test_bad_input(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot be exported to pt2"):
        export(Odd(), (), images(2), tmp_path / "odd.pt2", form="pt2", repeats=0)
    with pytest.raises(ValueError, match="at least 2 images"):
        export(tiny_vit(), (), images(1), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="onnx, pt2"):
        export(tiny_vit(), (), images(2), tmp_path / "x.trt", form="trt")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another place with --out"):
        export(tiny_vit(), (), images(2), tmp_path / "file" / "x.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def call(*words: object):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["export", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    words = ("digits-vit", "--reduce", "tome:r=2", "--format", "pt2", "-o", tmp_path / "d.pt2", "--batch", 3)
    result = call(*words, "--repeats", 1, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["input"], made["output"], made["spec"]) == (["batch", 1, 28, 28], "logits", "tome:r=2")
    assert made["speedup"]["ratio"] > 0
    for words, said in {
        ("digits-vit", "--reduce", "divprune:keep=9"): "acts outside of the encoder",
        ("digits-vit", "--format", "trt"): "--format is one of",
        ("nothing",): "unknown model",
        ("digits-vit", "--reduce", "tome:r=-x"): "r",
    }.items():
        failed = call(*words, "-o", tmp_path / "no.onnx")
        assert failed.exit_code == 2, failed.output
        assert said in failed.output
    assert not (tmp_path / "no.onnx").exists()
