"""``auto:``: what is known, how it is brought to a target, and what is said where that is not possible."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.cli import app
from tokenreduce.core.auto import auto_of
from tokenreduce.core.draft import Draft
from tokenreduce.core.flops import count_flops
from tokenreduce.core.undo import reducers_of
from tokenreduce.estimation import auto
from tokenreduce.estimation.auto import chosen_on, solved
from tokenreduce.estimation.known import Candidate, Group, Point, groups
from tokenreduce.estimation.live import subject_of_model
from tokenreduce.estimation.subject import Ask

pytest.importorskip("timm")
pytest.importorskip("transformers")
import timm
from vlms import VLMS


def test_every_known_setting_is_one_that_can_be_given():
    for name, group in groups().items():
        assert group.candidates, name
        for one in group.candidates:
            assert all("@" in method for method in one.methods)
            keeps = [p.keep for p in one.points]
            assert keeps == sorted(keeps, reverse=True)
            assert all(0 < k < 1 for keep in keeps for k in keep)
            assert {r.stage for r in one.draft.at(1.0)} == set(one.stages)
            assert all(0 <= p.score <= 1 for p in one.points)


def test_scores_lie_on_lines_between_what_was_measured():
    one = Candidate(("tome@encoder",), (Point((0.5,), 0.9, 0.01), Point((0.25,), 0.7, 0.02)), "a page")
    assert one.draft == Draft(("tome@encoder",), (0.25,))
    assert one.score(1.0, 1.0) == (pytest.approx(0.7), one.points[1])
    assert one.score(0.5, 1.0) == (pytest.approx(0.9), one.points[0])
    assert one.score(0.75, 1.0)[0] == pytest.approx(0.8)
    assert one.score(0.25, 1.0) == (pytest.approx(0.95), one.points[0])


def test_a_draft_is_brought_to_a_budget():
    draft = Draft(("visionzip", "tome"), (0.1, 0.5))
    asked = []

    def cost(reducers):
        asked.append(reducers)
        return 0.2 + 0.8 * reducers[0].keep * reducers[1].keep

    exponent, share = solved(draft, cost, 0.5)
    assert 0 < exponent < 1
    assert 0.48 <= share <= 0.5
    assert share == cost(draft.at(exponent))
    assert len(asked) < 10
    assert solved(draft, cost, 0.1) == (None, cost(draft.at(1.0)))
    assert solved(draft, cost, 1.0) == (0.0, 1.0)


def test_an_encoder_reaches_its_target_by_its_own_count(capsys):
    model = tr.zoo.load("world-vit").model
    x = torch.zeros(1, 3, 112, 112)
    stock = count_flops(model, x)
    assert tr.patch(model, "auto:flops=0.7,stages=encoder") is model
    (reducer,) = reducers_of(model)
    assert 0.6 < count_flops(model, x) / stock < 0.72
    said = capsys.readouterr().err
    assert said.startswith(
        f"auto:flops=0.7,stages=encoder stands for {reducer.name}@encoder:keep={reducer.keep} here: "
    )
    assert "scenes of world-vit that are right" in said
    shown = str(tr.describe(model))
    assert reducer.spec() in shown
    assert f"chosen   {said.strip()}" in shown
    assert f"[{reducer.spec()}]" in repr(model)
    tr.unpatch(model)
    assert "chosen" not in str(tr.describe(model))


def test_a_model_of_timm_is_made_narrow_by_its_name():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    subject = subject_of_model(torch.nn.Sequential(model), Ask())
    assert subject.parameters == sum(p.numel() for p in model.parameters())
    assert next(subject.narrow.parameters()).shape[-1] == 36
    odd = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    assert next(subject_of_model(odd, Ask()).narrow.parameters()).data_ptr() == next(odd.parameters()).data_ptr()


def test_shares_of_visual_tokens_are_kept_to_the_letter(capsys):
    model = VLMS["llava"].model
    with tr.patched(model, "auto:tokens=0.25") as same:
        (reducer,) = reducers_of(same)
    assert (reducer.stage, reducer.keep) == ("projector", 0.25)
    assert "it keeps 25 % of the visual tokens of every image" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nothing was measured below tokens=0.1"):
        tr.patch(model, "auto:tokens=0.01")
    assert not reducers_of(model)


def test_the_best_known_that_fits_is_taken(monkeypatch):
    known = {
        "language": Group("right answers", 1.0, tuple(
            Candidate((name,), (Point((keep,), score, 0.01),), "a page")
            for name, keep, score in [("vispruner@projector", 0.3, 0.5), ("divprune@projector", 0.3, 0.8),
                                      ("fastv@language", 0.9, 0.95), ("vid-tldr@encoder", 0.5, 0.99)]
        ))
    }  # fmt: skip
    monkeypatch.setattr(auto, "groups", lambda: known)
    subject = subject_of_model(VLMS["llava"].model, Ask(prompt=8))
    found = chosen_on(subject, auto_of("auto:flops=0.8,stages=[projector,language]"))
    assert found.reducers[0].name == "divprune", "fastv was not measured at so little"
    assert found.share <= 0.81
    assert "80.0 ±1.0 % at keep=0.3 (a page), unreduced 100.0 %" in found.reason
    with pytest.raises(
        ValueError, match=r"no known setting reaches it on .*; the nearest is \w+@projector:keep=0.3 at 0"
    ):
        chosen_on(subject, auto_of("auto:flops=0.01,stages=[projector,language]"))
    known["language"] = Group("right answers", 1.0, ())
    with pytest.raises(ValueError, match=r"nothing is known of .* what fits it at stage language: .*fastv"):
        chosen_on(subject, auto_of("auto:flops=0.8,stages=language"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auto:kv=0.5", "has no cache of keys and values; give flops= or ttft="),
        ("auto:tokens=0.5", "has no language model that visual tokens enter"),
        ("auto:ttft=0.5,on=h10", "unknown device 'h10'; known: h100"),
        ("auto:flops=0.5,stages=projector", "has no stage projector; it has encoder"),
    ],
)
def test_what_a_model_has_not_is_said_before_anything_is_computed(text, said, monkeypatch):
    monkeypatch.setattr(auto, "subject_of_model", lambda *_: pytest.fail("nothing is to be computed"))
    with pytest.raises(ValueError, match=said):
        tr.patch(timm.create_model("vit_tiny_patch16_224", depth=1), text)


def test_a_model_of_unknown_shapes_is_told_what_fits():
    model = VLMS["video_llava"].model
    with pytest.raises(ValueError, match=r"nothing is known of VideoLlava.*what fits it at stage \w+: "):
        tr.patch(model, "auto:flops=0.5")


def test_an_estimate_names_what_was_chosen():
    shown = CliRunner().invoke(app, ["estimate", "world-llava", "--reduce", "auto:tokens=0.25", "--json"])
    assert shown.exit_code == 0, shown.output
    made = json.loads(shown.stdout)
    assert made["reduce"] == "visionzip:keep=0.25"
    assert made["notes"][0].startswith("auto:tokens=0.25 stands for visionzip@projector:keep=0.25 here: ")


@pytest.mark.slow
def test_a_sweep_names_what_was_chosen(tmp_path):
    words = ["bench", "vlm", "--limit", "4", "--reduce", "auto:tokens=0.5", "--repeats", "0", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert "auto:tokens=0.5 stands for " in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert any(row["spec"].endswith(":keep=0.5") for row in rows)
    assert not any("auto" in row["spec"] for row in rows)
