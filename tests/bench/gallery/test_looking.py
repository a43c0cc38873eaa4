"""Looking what methods keep: in the encoder, before and inside the language model, in its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.gallery import __main__ as command
from tokenreduce.bench.gallery import looking
from tokenreduce.bench.gallery.kept import Kept, Without, as_text, read_kept
from tokenreduce.bench.gallery.looking import kept_by, setting
from tokenreduce.bench.gallery.pictures import QUESTIONS, scenes
from tokenreduce.core.registry import load_all

pytest.importorskip("transformers")
STORED = Path(__file__).parents[3] / "docs" / "kept.json"


def test_a_quarter_of_the_tokens_is_shown_where_it_can_be_told():
    assert [r.spec() for r in setting("tome")] == ["tome:keep=0.25"]
    assert [r.name for r in setting("mustdrop-cache")] == ["mustdrop", "mustdrop-cache"]
    with pytest.raises(ValueError, match="unknown method"):
        kept_by("not-a-method")


def test_what_goes_before_the_language_model_is_what_its_plan_drops():
    """By the plan of the method itself, on the tokens of the model's own projector."""
    import torch

    kept = kept_by("divprune")
    loaded = looking._vlm()
    for number, image in enumerate(scenes()):
        pixels = loaded.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = loaded.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        plan = tr.DivPrune(keep=49).plan(tr.Evidence(x=torch.stack(list(seen)).view(1, 196, -1), grid=(14, 14)))
        assert ((plan.sources()[0] >= 0).view(14, 14).numpy() == (kept.maps[number] >= 0)).all()
    assert kept.left() == [(49, 196)] * 3


def test_in_the_cache_heads_are_counted_layer_by_layer():
    assert kept_by("snapkv").heads == 4
    kept = kept_by("recent")
    assert kept.heads == 1, "all heads hold the same"
    for layers in kept.maps:
        assert layers.shape == (6, 14, 14)
        assert (layers.reshape(6, 196)[:, -49:] == 1).all(), "the last quarter stays"
        assert not layers.reshape(6, 196)[:, :-49].any()


def test_methods_that_keep_every_key_have_no_picture(monkeypatch):
    monkeypatch.setitem(looking.SETTINGS, "recent", {"keep": 1.0})
    assert kept_by("recent") == Without("it holds the keys of all visual tokens in all layers and heads.")
    monkeypatch.setitem(looking.WITHOUT, "recent", "Because.")
    assert kept_by("recent") == Without("Because.")


def test_frames_lie_side_by_side():
    kept = kept_by("uniform-frames")
    (region,) = kept.maps
    frames = (region >= 0).reshape(7, 8, 7).all((0, 2))
    assert frames.sum() == 2
    assert kept.left() == [(98, 392)]


def test_the_command_replaces_some_and_keeps_the_others(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(command.main)
    file = tmp_path / "kept.json"
    file.write_text(as_text({"tome": Without("old"), "gone": Without("old"), "uniform": Without("old")}))
    done = CliRunner().invoke(app, [str(file), "--methods", "tome"])
    assert done.exit_code == 0, done.output
    assert "tome: 49 of 196, 49 of 196, 49 of 196" in done.output
    got = read_kept(file)
    assert set(got) == {"tome", "uniform"}, "a method that is gone goes from the file, too"
    assert isinstance(got["tome"], Kept)
    assert CliRunner().invoke(app, [str(file), "--methods", "nothing*"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encoder", "projector", "language", "cache"])
def test_what_is_stored_is_what_methods_keep_now(stage):
    """Up to ties that other processors decide otherwise."""
    stored = read_kept(STORED)
    for name in (n for n, kind in load_all().items() if kind.stage == stage):
        now, then = kept_by(name), stored[name]
        if isinstance(now, Without):
            assert now == then
            continue
        assert (now.spec, now.heads) == (then.spec, then.heads)
        for a, b in zip(now.maps, then.maps, strict=True):
            gone = np.abs(a - b) > now.heads / 8 if now.heads else (a < 0) != (b < 0)
            assert gone.mean() < 0.1, name
        assert now.left() == pytest.approx(np.array(then.left()), rel=0.1), name


def test_every_picture_has_a_question():
    assert len(QUESTIONS) == len(scenes()) + 1
