"""The second world as data of the benchmarks: several labels per picture, long answers scored by element."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.bench.asking.pictures import Pictures
from tokenreduce.bench.clips import load_clips
from tokenreduce.bench.data import load_data
from tokenreduce.bench.models import load_model
from tokenreduce.bench.resolve import resolve
from tokenreduce.bench.vision import VisionTask
from tokenreduce.bench.vlms import is_vlm, load_vlm
from tokenreduce.cli.bench import data_of
from tokenreduce.zoo import evaluation2, weights
from tokenreduce.zoo.world2 import IMAGE_TYPES, LONG, READING, SPLITS, VIDEO_TYPES, scene


def test_questions_are_of_every_type_and_long_answers_are_graded() -> None:
    source = Pictures("world2-all", "test", 2 * len(IMAGE_TYPES), 0)
    assert [item.type for item in source.items] == 2 * list(IMAGE_TYPES)
    assert source.items[0].open().size == (224, 224)
    said = {item.id: item.answers[0] for item in source.items}
    assert source.graded(said) == dict.fromkeys((f"elements_{t}" for t in (*LONG, *READING)), 1.0)
    for item in source.items:  # case, signs and blanks do not count
        assert source.read(item, f"{item.answers[0].upper()} .")[1]
    listed = next(item for item in source.items if item.type == "list")
    said[listed.id] = " ".join(listed.answers[0].split()[:2])
    assert 0 < source.graded(said)["elements_list"] < 1
    assert not source.read(listed, said[listed.id])[1]


def test_questions_are_of_the_types_that_the_model_has_learned(monkeypatch) -> None:
    card = {"learned": "colour_of, read", "accuracy": 0.97}
    monkeypatch.setattr(weights, "read_card", lambda name, folder=None: card)
    assert [item.type for item in Pictures("world2", "test", 4, 0).items] == ["colour_of", "read"] * 2
    card["learned"] = ""
    assert len({item.type for item in Pictures("world2", "test", len(IMAGE_TYPES), 0).items}) == len(IMAGE_TYPES)


def test_questions_of_the_first_world_are_graded_as_before() -> None:
    source = Pictures("world", "test", 2, 0)
    assert source.graded({item.id: item.answers[0] for item in source.items}) == {}


def test_names_lead_to_their_own_data_and_what_is_not_learned_is_refused() -> None:
    assert data_of("world-llava-2", None, "") == "world2"
    assert data_of("world-llava", None, "") == "world"
    assert resolve("world-llava-2") == ("language", "world-llava-2")
    assert resolve("world-vit-2") == ("image", "world-vit-2")
    assert is_vlm("world-llava-2")
    with pytest.raises(ValueError, match="classifies images; embedded models that answer questions: world-llava, "):
        load_vlm("world-vit-2")


def test_clips_of_the_second_world_are_of_the_types_that_are_asked_for() -> None:
    learned = evaluation2.learned_types(VIDEO_TYPES)
    for data, types in (("world2", learned), ("world2-all", VIDEO_TYPES)):
        found = load_clips(data, limit=len(types))
        assert tuple(item.type for item in found.items) == types
        assert found.items[0].image.shape == (evaluation2.FRAMES, 224, 224, 3)
    with pytest.raises(ValueError, match="layout 'world' is for --data world, world2, world2-all, not clips"):
        load_clips("clips", "world")


def test_labels_are_what_is_in_the_picture() -> None:
    if "world-vit-2" not in weights.stored():
        pytest.skip("the weights of world-vit-2 are not in the package yet")
    loaded = load_model("world-vit-2")
    images = load_data("world2", "test", loaded, 5)
    assert images[0][1].shape == (3, 224, 224)
    for seed, labels in zip(images.items, images.labels, strict=True):
        assert seed in SPLITS["test"]
        made = scene(seed, objects=(3, 6), signs=(1, 2), document=0.0)
        there = {t.kind for t in made.objects} | {c for s in made.signs for c in s.text}
        assert {images.classes[i] for i in labels if i >= 0} == there


# -- zero-shot ---------------------------------------------------------------------------------------------------------
def test_the_embedded_clip_names_what_a_picture_shows() -> None:
    loaded = load_model("world-clip-2")
    assert (loaded.kind, loaded.input_size, loaded.templates) == ("zero-shot", (3, 224, 224), "name")
    images = load_data("world2-one", "test", loaded, 24)
    assert len(images.classes) == 96
    assert len(set(images.labels)) > 15
    for seed, label in zip(images.items, images.labels, strict=True):
        (thing,) = scene(seed, objects=(1, 1), signs=(0, 0), document=0.0).objects
        assert images.classes[label] == f"{thing.colour} {thing.kind}"
    loaded = loaded.with_classes(images.classes)
    with torch.no_grad():
        guess = loaded.predict(torch.stack([images[i][1] for i in range(24)])).argmax(-1)
    assert float((guess == torch.tensor(images.labels)).float().mean()) >= 0.9
    kinds = loaded.with_classes(["star", "ring"])  # any names of the world will do
    assert kinds.classifier is not None
    assert kinds.classifier.shape == (64, 2)
    with pytest.raises(ValueError, match="world-clip-2 does not know the word 'dog' of 'red dog'"):
        loaded.with_classes(["red star", "red dog"])


def test_methods_act_on_its_vision_tower_alone() -> None:
    task = VisionTask("world-clip-2", "world2-one", limit=8, batch=8, repeats=0)
    whole, reduced = task.measure(()), task.measure(tr.parse("tome:r=60"))
    assert whole["tokens"][-1] == 785
    assert reduced["tokens"][-1] == 785 - 6 * 60
    assert whole["top1"] >= 0.87
    assert reduced["flops"] < 0.8 * whole["flops"]
    assert resolve("world-clip-2") == ("image", "world-clip-2")
