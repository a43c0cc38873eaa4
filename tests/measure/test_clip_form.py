"""The form in which a model is asked about clips, wherever it is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from vlm_folders import save_llava, save_onevision, save_qwen

from tokenreduce.bench.asking.films import FilmAsker
from tokenreduce.bench.vlms import load_vlm
from tokenreduce.measure.clip_form import SMALL, clip_form, knows_the_world
from tokenreduce.measure.frames import frames_question
from tokenreduce.zoo import evaluation2, processor, world_llava
from tokenreduce.zoo.examples import clip2_examples, clip_examples


def test_embedded_models_have_the_clips_that_they_were_taught_with() -> None:
    assert clip_form(processor("world-llava")) == ("own", 8) == ("own", len(clip_examples(1)[0].frames))
    assert clip_form(processor("world-llava-2")) == ("own", evaluation2.FRAMES) == ("own", 16)
    assert len(clip2_examples(1)[0].frames) == 16


@pytest.mark.parametrize(("save", "kind"), [(save_llava, "images"), (save_qwen, "video"), (save_onevision, "video")])
def test_other_models_are_known_by_their_processors(save, kind, tmp_path) -> None:
    loaded = load_vlm(str(save(tmp_path / "model")), "cpu")
    assert clip_form(loaded.processor) == (kind, 8)
    assert FilmAsker(loaded, True, False).kind == kind


def test_a_copy_under_another_name_is_asked_alike() -> None:
    torch.manual_seed(0)
    model, reading = world_llava.build().eval(), processor("world-llava")
    example = clip_examples(1)[0]
    own, copy = (
        frames_question(SimpleNamespace(name=name, model=model, processor=reading), example.frames, "what is there")
        for name in ("world-llava", "runs/mine")
    )
    assert copy.remake is not None
    assert torch.equal(own.inputs["input_ids"], copy.inputs["input_ids"])
    assert int((copy.inputs["input_ids"] == model.config.image_token_id).sum()) == 8 * 49


def test_a_vocabulary_of_a_language_has_the_words_and_is_not_of_the_world() -> None:
    known = processor("world-llava").tokenizer.get_vocab()
    few = {**known, **{f"w{i}": i for i in range(SMALL - len(known))}}
    assert knows_the_world(SimpleNamespace(get_vocab=lambda: few))
    assert not knows_the_world(SimpleNamespace(get_vocab=lambda: {**few, "more": 0}))
    assert not knows_the_world(SimpleNamespace(get_vocab=lambda: {k: v for k, v in known.items() if k != "star"}))
