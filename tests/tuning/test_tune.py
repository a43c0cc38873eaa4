from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.cli import app
from tokenreduce.core.flops import count_flops
from tokenreduce.core.undo import reducers_of
from tokenreduce.tuning.scored import ImageScored, QuestionScored

pytest.importorskip("optuna")
pytest.importorskip("transformers")
pytest.importorskip("timm")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("tune")
    return tr.tune("world-llava", target="kv=0.4", stages=["projector"], trials=2, limit=96, out=out)


def test_what_was_found_is_put_into_the_model_by_its_file(found):
    assert found.share <= 0.41
    assert (found.score.n, found.unreduced.n) == (48, 48)
    assert found.reduce.startswith(("visionzip@projector", "vispruner@projector"))
    raw = json.loads(found.file.read_text())
    assert raw["reduce"] == found.reduce
    assert raw["facts"]["target"] == "kv=0.4"
    model = tr.patch(tr.zoo.load("world-llava").model, str(found.file))
    assert reducers_of(model) == tr.parse(found.reduce)
    assert str(found.file) in str(found)
    assert "held out (48 samples)" in str(found)
    with pytest.raises(ValueError, match="was found for world-llava, a LlavaModel, and this model is a timm"):
        tr.patch(tr.zoo.load("world-vit").model, str(found.file))


def test_the_same_search_again_measures_nothing_anew(found, monkeypatch):
    def never(*_):
        raise AssertionError("this was measured already")

    scored = QuestionScored._score
    monkeypatch.setattr(QuestionScored, "_score", lambda self, part: scored(self, part) if part == "held" else never())
    again = tr.tune("world-llava", target="kv=0.4", stages=["projector"], trials=2, limit=96, out=found.file.parent)
    assert again == found


def test_costs_and_scores_of_an_image_model():
    scored = ImageScored("world-vit", "world", 96, 0, "cpu", 32)
    reducers = tr.parse("tome:keep=0.5")
    assert {"tome", "evit"} <= set(scored.names()["encoder"])
    assert not {"random", "uniform"} & set(scored.names()["encoder"])
    assert 0.5 < scored.cost(reducers, "flops") / scored.cost((), "flops") < 0.95
    assert scored.score((), "held").value > 0.95
    assert scored.score(reducers, "first").n == 12
    assert not reducers_of(scored.model)
    # What ATS keeps depends on the image: on scenes it is not what it is on noise.
    ats = tr.parse("ats:keep=0.5")
    alone = []
    for image in scored._batches("first")[0].x[:3].split(1):
        with tr.patched(scored.model, *ats):
            alone.append(count_flops(scored.model, image))
    assert scored.cost(ats, "flops") == pytest.approx(sum(alone) / 3)
    assert len(set(alone)) > 1


def test_the_command(tmp_path):
    args = ["tune", "digits-vit", "--target", "flops=0.6", "--trials", "1", "--limit", "96"]
    made = CliRunner().invoke(app, [*args, "--out", str(tmp_path), "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["target"] == "flops=0.6"
    assert found["share"] <= 0.61
    assert (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["world-vit", "--target", "kv=0.5"], "world-vit has no cache of keys and values"),
        (["world-vit", "--stages", "language"], "world-vit has the stage encoder only"),
        (["world-vit", "--limit", "20"], "20 samples are too few"),
        (["world-vit", "--target", "speed=2"], "target is flops=SHARE"),
        (["timm:vit_tiny_patch16_224?pretrained=false"], "data is needed for"),
    ],
)
def test_bad_input_is_one_message(args, said, tmp_path):
    made = CliRunner().invoke(app, ["tune", *args, "--out", str(tmp_path)])
    assert made.exit_code == 2
    assert said in " ".join(made.output.split())


def test_a_target_out_of_reach_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"no setting reaches flops=0.05; the nearest of 1 trials is visionzip@"):
        tr.tune("world-llava", target="flops=0.05", stages=["projector"], trials=1, limit=96, out=tmp_path)
