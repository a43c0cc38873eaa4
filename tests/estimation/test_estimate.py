from __future__ import annotations

import json

import pytest

import tokenreduce as tr
from tokenreduce.estimation.ops import DECODE, PREFILL, PROJECTOR, TOWER
from tokenreduce.estimation.prompts import FILMS, IMAGES
from tokenreduce.estimation.record import recorded
from tokenreduce.estimation.subject import Ask
from tokenreduce.estimation.subjects import subject_of
from tokenreduce.estimation.table import amount, took

pytest.importorskip("timm")
pytest.importorskip("transformers")
from vlms import VLMS

TINY = "timm:vit_tiny_patch16_224?img_size=64&depth=3&patch_size=8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def write(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        VLMS[name].model.config.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def llava(folders):
    return folders("llava")


def by_name(side):
    return {p.name: p for p in side.parts}


def test_an_estimate_of_a_language_model(llava):
    made = tr.estimate(llava, "divprune:keep=5", batch=3, prompt=8, answer=10)
    assert (made.visual, made.prompt, made.answer, made.reduce) == (16, 8, 10, "divprune:keep=5")
    stock, reduced = by_name(made.stock), by_name(made.reduced)
    assert list(stock) == [TOWER, PROJECTOR, PREFILL, DECODE]
    assert stock[TOWER] == reduced[TOWER]
    assert (stock[PREFILL].tokens, reduced[PREFILL].tokens) == (24, 13)
    # 4 layers, two heads of 8 numbers for keys and for values, two bytes each.
    assert made.stock.cache_bytes == 3 * 4 * 24 * 2 * 2 * 8 * 2
    assert made.reduced.cache_bytes == 3 * 4 * 13 * 2 * 2 * 8 * 2
    one = tr.estimate(llava, "divprune:keep=5", prompt=8)
    assert by_name(one.stock)[PREFILL].flops * 3 == pytest.approx(stock[PREFILL].flops)
    assert by_name(one.stock)[DECODE].bytes * 3 > stock[DECODE].bytes  # weights are read once
    assert made.total(made.stock) == made.stock.first_token + 10 * made.stock.token
    assert reduced[PROJECTOR].own > 0
    assert set(made.limits) == {"projector"}
    assert made.stock.largest_batch <= made.reduced.largest_batch
    assert json.loads(json.dumps(made.to_dict()))["reduced"]["parts"][2]["tokens"] == 13


def test_tables_fit_into_80_columns(llava):
    for made in (
        tr.estimate(llava, "divprune:keep=5+fastv:layer=2,keep=0.5"), tr.estimate(llava, device="jetson-orin"),
        tr.estimate(TINY, "tome:r=4", batch=8),
    ):  # fmt: skip
        lines = str(made).splitlines()
        assert max(map(len, lines)) <= 80
        assert any(line.startswith("part ") for line in lines)
    text = str(tr.estimate(llava, "divprune:keep=5", device="cpu", dtype="fp32"))
    for said in ("both", "reduced", "own work", "bound by", "Largest batch", "of the projector stage can exceed"):
        assert said in text
    assert "KV" in text
    assert "is bound by starting operators, which fewer tokens do not change" in " ".join(
        str(tr.estimate(llava)).split()
    )


def test_a_budget_that_keeps_everything_changes_no_tokens(llava):
    made = tr.estimate(llava, "divprune:keep=1.0", prompt=8)
    assert by_name(made.stock)[PREFILL].tokens == by_name(made.reduced)[PREFILL].tokens
    assert made.worth.tokens is None
    assert "No budget of it gains 5 % here" in str(made)


def test_methods_that_look_at_the_image_say_that_it_is_noise():
    assert any("which is noise here" in note for note in tr.estimate(TINY, "ats:keep=0.5").notes)
    assert not any("noise" in note for note in tr.estimate(TINY, "tome:r=4").notes)


def test_an_encoder_has_one_part():
    made = tr.estimate(TINY, "tome:r=8", batch=64)
    assert [p.name for p in made.stock.parts] == [TOWER]
    assert by_name(made.stock)[TOWER].tokens == 65
    assert by_name(made.reduced)[TOWER].tokens == 57  # 65, 57, 49 enter the blocks, and their MLPs 57, 49, 41
    assert not made.answers
    assert made.token_speedup is None
    assert "first token" not in str(made)


@pytest.mark.parametrize("name", ["world-vit", "digits-vit", "world-llava"])
def test_embedded_models(name):
    assert tr.estimate(name).stock.first_token > 0
    with pytest.raises(ValueError, match=f"{name} takes images of"):
        tr.estimate(name, image=(64, 32))


@pytest.mark.parametrize("name", [n for n in VLMS if VLMS[n].inner in IMAGES])
def test_every_family_is_asked_from_its_config(folders, name):
    folder, family = folders(name), VLMS[name].inner
    subject = subject_of(folder, Ask((64, 64) if "qwen" in name else None))
    assert subject.visual > 0
    assert subject.text >= 64
    made = recorded(subject, tr.parse("divprune:keep=0.5"))
    assert made.cached[0] < subject.visual + subject.text
    assert made.tokens(TOWER) > 0
    if family in FILMS:
        film = subject_of(folder, Ask((64, 64) if "qwen" in name else None, frames=4))
        assert film.visual > 0
        assert recorded(film, tr.parse("divprune:keep=0.5")).cached[0] < film.visual + film.text
    else:
        with pytest.raises(ValueError, match="takes images and no videos; families with --frames"):
            subject_of(folder, Ask(frames=4))


def test_long_clips_are_tried_on_fewer_frames(folders, monkeypatch):
    folder = folders("qwen2_5_vl")
    ask = Ask((64, 64), frames=32)
    whole = recorded(subject_of(folder, ask), tr.parse("divprune:keep=128"))
    monkeypatch.setattr("tokenreduce.estimation.hf_subjects.LONGEST", 256)
    short = subject_of(folder, ask)
    assert short.share == pytest.approx(0.25)
    assert any("tried on 8 of 32 frames" in note for note in short.notes)
    made = recorded(short, tr.parse("divprune:keep=128"))
    assert made.cached == pytest.approx(whole.cached, rel=0.02)
    for part in (TOWER, PREFILL):
        want = sum(op.flops for op in whole.of(part))
        assert sum(op.flops for op in made.of(part)) == pytest.approx(want, rel=0.02)


def test_configs_that_contradict_themselves_are_refused(tmp_path):
    config = VLMS["llava"].model.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_id": 500, "image_token_index": 500}))
    with pytest.raises(ValueError, match="placeholder 500 is not among the 120 tokens of its vocabulary"):
        tr.estimate(str(tmp_path))
    config["text_config"]["hidden_size"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"cannot read the config of .* Fix: give a folder"):
        tr.estimate(str(tmp_path))


def test_sections_of_rotary_embeddings_that_a_config_leaves_out(folders, tmp_path):
    config = VLMS["qwen2_vl"].model.config.to_dict()
    config["text_config"].pop("rope_parameters", None)
    config["text_config"].pop("rope_scaling", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert subject_of(str(tmp_path), Ask((64, 64))).visual > 0


def test_bad_input(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="has no vision part: its config is of a llama model"):
        tr.estimate(str(tmp_path))
    with pytest.raises(OSError, match="cannot read the config of"):
        tr.estimate(str(tmp_path / ".."))
    with pytest.raises(ValueError, match="timm has no model 'vit_tiny_patch16_225'; did you mean"):
        tr.estimate("timm:vit_tiny_patch16_225")
    with pytest.raises(ValueError, match="unknown device 'tpu'; known: h100"):
        tr.estimate(TINY, device="tpu")
    with pytest.raises(ValueError, match="batch is an int >= 1"):
        tr.estimate(TINY, batch=0)
    with pytest.raises(ValueError, match="takes images; --frames is for video language models"):
        tr.estimate(TINY, frames=8)
    with pytest.raises(ValueError, match="unknown model 'nonsense:x'"):
        tr.estimate("nonsense:x")
    with pytest.raises(ValueError, match="layer"):
        tr.estimate("world-llava", "fastv:layer=40")


def test_amounts():
    assert [amount(x, "B") for x in (0, 999.6e6, 1.234e9, 5e15)] == ["0 B", "1000 MB", "1.23 GB", "5 PB"]
    assert [took(x) for x in (2.0, 0.012, 3e-5)] == ["2.00 s", "12 ms", "0.03 ms"]
