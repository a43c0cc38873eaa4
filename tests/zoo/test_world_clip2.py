"""``world-clip-2``: its losses, its parts, and that the shipped weights are what their card says."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokenreduce as tr
from tokenreduce.zoo import weights

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokenreduce.adapters.language.projector.clip_text import joint_space
from tokenreduce.zoo import world2_batches, world2_texts, world_clip2, world_vit, world_vit2
from tokenreduce.zoo.clip_twin import clip_state
from tokenreduce.zoo.training import Schedule
from tokenreduce.zoo.world_vit import pixels


@functools.cache
def shipped():
    return tr.zoo.load("world-clip-2")


@functools.cache
def vit():
    return tr.zoo.load("world-vit-2").model


# -- training ----------------------------------------------------------------------------------------------------------
def test_grounding_is_small_where_what_a_text_is_about_comes_first() -> None:
    about = torch.tensor([[[True, True, False, False], [False] * 4, [True] * 4]])
    right = torch.tensor([[[8.0, 8.0, -8.0, -8.0], [1.0, 2, 3, 4], [1.0, 2, 3, 4]]])
    assert float(world_clip2.grounding(right, about)) < 1e-6
    even = torch.zeros(1, 3, 4)
    # One of three: itself and the two that the text is not about. Texts about nothing or all do not count.
    torch.testing.assert_close(world_clip2.grounding(even, about), torch.tensor(3.0).log())
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    world_clip2.grounding(logits, about).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 1:] == 0).all()
    assert (logits.grad[0, 0, :2] < 0).all()


def test_training_leaves_the_tower_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_clip2, "held_out", lambda model: {"zero_accuracy": 0.5})  # takes seconds
    torch.manual_seed(2)
    encoder = world_vit2.grown(world_vit.build()).eval()
    before = clip_state(encoder.state_dict())

    def run(folder: Path, steps: int, **more: object):
        stages = (world_clip2.Stage("subset", Schedule(steps, batch=4, warmup=1, seed=5), 40),)
        return world_clip2.train(folder, encoder=encoder, stages=stages, workers=0, report=rows.append, **more)

    rows: list[dict] = []
    half = run(tmp_path / "a", 2, save_every=1, stop_after=0.0)
    assert [row["step"] for row in rows] == [1]
    there = run(tmp_path / "a", 2, save_every=1)
    assert [row["step"] for row in rows] == [1, 2]
    whole = run(tmp_path / "b", 2, save_every=2)
    start = half.state_dict()
    assert rows[-1]["accuracy"] == 0.5
    for name, value in there.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert not torch.equal(start["visual_projection.weight"], there.visual_projection.weight)
    for name, value in before.items():
        assert torch.equal(value, there.vision_model.state_dict()[name]), name


# -- what ships --------------------------------------------------------------------------------------------------------
def test_the_card_is_complete_and_small() -> None:
    card = shipped().card
    assert {"command", "steps", "minutes", "data", "limits", "accuracy", "not_learned", "encoder", "figures"} <= set(
        card
    )
    assert card["steps"] == card["curve"]["step"][-1] == sum(s.schedule.steps for s in world_clip2.STAGES)
    assert card["accuracy"] >= 0.95
    assert "/work" not in card["command"]
    assert 200_000 <= card["text_parameters"] <= 400_000
    assert "world-clip-2" in weights.learned()
    assert shipped().labels == world_clip2.LABELS
    assert len(shipped().labels) == 96


def test_the_vision_tower_is_the_shipped_encoder_bit_for_bit() -> None:
    tower = shipped().model.vision_model.state_dict()
    want = clip_state(vit().state_dict())
    assert set(want) == set(tower)
    for name, value in want.items():
        assert torch.equal(value, tower[name]), name
    llava = tr.zoo.load("world-llava-2").model.model.vision_tower.state_dict()
    assert all(torch.equal(llava[name], value) for name, value in tower.items())


def test_zero_shot_is_what_the_card_says() -> None:
    found = world_clip2.accuracy(shipped().model, "test", scenes=60)
    assert found["accuracy"] >= shipped().card["accuracy"] - 0.07
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        world_clip2.accuracy(shipped().model, "tests")


def test_patches_are_near_the_words_for_what_they_show() -> None:
    """On held-out scenes, and as the methods read them: of all names of a group the right one, and by a margin."""
    space = joint_space("world-clip-2")
    made = world2_batches.sights(0, batch=4, seed=72, split="test", scenes=(world2_batches.SPARSE,))
    with torch.no_grad():
        x = world_vit2.look(vit(), pixels(made.pixels))[0][:, 1:]
    patches = F.normalize(space.patches(x), dim=-1).flatten(0, 1)
    for row, group, least in ((0, "kind", 0.95), (1, "colour", 0.85), (2, "character", 0.9)):
        label = torch.from_numpy(made.labels[:, row]).flatten()
        names = F.normalize(space.texts(world2_texts.NAMES[group])[0][:, 0], dim=-1)
        near = patches[label >= 0] @ names.T
        right = label[label >= 0]
        assert float((near.argmax(-1) == right).float().mean()) >= least, group
        own = near.gather(1, right[:, None])
        others = (near.sum(1, keepdim=True) - own) / (len(names) - 1)
        assert float((own - others).mean()) >= 0.2, group


def test_questions_are_near_what_they_ask_about() -> None:
    """Of the patches that a question is about, nearly all are among as many nearest ones, and a few by chance."""
    found = world_clip2.found(shipped().model, vit(), batches=1)
    single = ("colour_of", "kind_of", "at_kind", "at_colour", "side", "read", "letter", "cell")
    got = [found[name] for name in single]
    assert sum(got) / len(got) >= 0.85
    assert min(got) >= 0.6
    assert found["(by chance)"] <= 0.1


def test_one_text_is_read_alike_by_the_model_the_methods_and_from_a_folder(tmp_path: Path) -> None:
    made, space = shipped(), joint_space("world-clip-2")
    texts = ["red star", "What color is the star?"]
    given = made.processor(text=texts, return_tensors="pt", padding=True)
    assert given["input_ids"][0].tolist()[:4] == world2_texts.rows(["red star"])[0].tolist()
    with torch.no_grad():
        want = made.model.get_text_features(**given).pooler_output
    torch.testing.assert_close(space.texts(texts)[0][:, 0], want)
    assert space.sign == 1
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    stored = joint_space(str(tmp_path))
    assert stored.sign == 1
    torch.testing.assert_close(stored.texts(texts)[0], space.texts(texts)[0])
    with pytest.raises(ValueError, match=r"clip='world-clip-2' does not know the word 'dog' of 'a red dog'"):
        space.texts(["a red dog"])
