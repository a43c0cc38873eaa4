"""Questions about frames, several reductions at once, and pictures of what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_folders import save_llava

from tokenreduce.bench.vlms import load_vlm
from tokenreduce.measure.frames import ask_frames
from tokenreduce.measure.generation import compare, compare_several
from tokenreduce.measure.kept import kept_views, places, sheet
from tokenreduce.measure.question import ask
from tokenreduce.zoo.examples import clip_examples, scene_examples


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Any:
    return load_vlm(str(save_llava(tmp_path_factory.mktemp("vlm") / "llava")), "cpu")


@pytest.fixture(scope="module")
def world() -> Any:
    """The embedded model before its training."""
    from tokenreduce.zoo import world_llava, world_words

    torch.manual_seed(0)
    return SimpleNamespace(name="world-llava", model=world_llava.build().eval(), processor=world_words.processor())


def test_several_reductions_are_each_what_one_is(llava) -> None:
    question = ask(llava.processor, [scene_examples(1)[0].image], "what is this ?")
    specs = (["divprune:keep=0.3"], ["fastv:layer=2,keep=0.5", "tome:keep=0.5"])
    made = compare_several(llava.model, llava.processor, question, specs, max_new_tokens=4, rounds=2)
    for spec, both in zip(specs, made, strict=True):
        one = compare(llava.model, llava.processor, question, spec, max_new_tokens=4, rounds=1)
        assert (both.spec, both.reduced.ids, both.reduced.layers) == (one.spec, one.reduced.ids, one.reduced.layers)
        assert (both.stock.ids, both.sites, both.reduced.cache) == (one.stock.ids, one.sites, one.reduced.cache)
        assert len(both.reduced.first.times) == len(both.stock.first.times) == 2
    assert made[0].stock is made[1].stock


def test_other_models_get_an_image_per_frame(llava) -> None:
    frames = list(clip_examples(1)[0].frames[:3])
    question, where = ask_frames(llava, frames, "what is this ?")
    assert question.remake is None
    assert len(where) == 3
    assert int((question.inputs["input_ids"] == llava.model.config.image_token_id).sum()) == 3 * 64
    for text, pictures, words in ((" ", frames, "prompt is empty"), ("what", [], "no frame")):
        with pytest.raises(ValueError, match=words):
            ask_frames(llava, pictures, text)


def test_the_embedded_model_gets_pooled_frames(world) -> None:
    example = clip_examples(1)[0]
    question, where = ask_frames(world, example.frames, example.questions[0][0])
    assert len(where) == 8
    assert all(place.grid == (7, 7) for place in where)
    assert torch.cat([p.columns for p in where]).unique().numel() == 8 * 49
    (made,) = compare_several(
        world.model, world.processor, question, [["divprune:keep=0.25"]], max_new_tokens=1, rounds=1
    )
    assert made.stock.layers[0] == 392
    assert made.reduced.layers[0] < 392 / 3


def test_the_tower_sees_its_own_reduction(world) -> None:
    """Features that are made before the call are made again under the patch."""
    example = clip_examples(1)[0]
    question, _ = ask_frames(world, example.frames, example.questions[0][0])
    (made,) = compare_several(world.model, world.processor, question, [["evit:keep=0.3"]], max_new_tokens=1, rounds=1)
    assert any(step.stage == "encoder" and step.plan is not None for step in made.steps)


def test_views_show_what_is_left(llava) -> None:
    image = scene_examples(1)[0].image
    question = ask(llava.processor, [image], "what is this ?")
    where = places(llava.model, llava.processor, question)
    specs = [["divprune:keep=16"], ["tome:keep=1.0"]]
    few, whole = compare_several(llava.model, llava.processor, question, specs, max_new_tokens=1, rounds=1)
    (picture, line), (all_of_it, all_line) = kept_views(few, where)[0], kept_views(whole, where)[0]
    assert line == "16 of 64 tokens"
    assert all_line == "64 of 64 tokens"
    assert picture.size == all_of_it.size
    dark = [float(np.asarray(p).mean()) for p in (picture, all_of_it)]
    assert dark[0] < dark[1]


def test_a_sheet_has_room_for_every_picture() -> None:
    pictures = [Image.new("RGB", (20, 10 + i), (10 * i, 200, 0)) for i in range(8)]
    made = sheet(pictures, side=40, gap=2)
    assert made.size == (3 * 42 - 2, 3 * 42 - 2)
    assert made.getpixel((44, 2)) == (10, 200, 0)
    assert sheet(pictures[:1]) is pictures[0]


def test_examples_are_held_out_and_come_with_their_answers() -> None:
    from tokenreduce.zoo.evaluation import SPLITS

    scenes, clips = scene_examples(2), clip_examples(1)
    assert all(e.image.size == (112, 112) and e.questions and e.truth for e in (*scenes, *clips))
    assert len(clips[0].frames) == 8
    assert SPLITS["test"].start not in SPLITS["train"]
    assert scene_examples(2) is scenes  # drawn once
