"""The shipped ``world-llava`` tells methods apart, as models of real size do, and is what its card says."""

from __future__ import annotations

import functools
import shutil

import pytest

import tokenreduce as tr
from tokenreduce.zoo import training, weights, world_llava, world_vit
from tokenreduce.zoo.evaluation import KINDS_OF_TYPES

pytest.importorskip("timm")
pytest.importorskip("transformers")

#: Questions per figure: one standard error is below 4.6 points at 50 %, and below 2 at 95 %.
IMAGE, HOPS, VIDEO = 220, 200, 120


@functools.cache
def model():
    shipped("world-llava")
    return tr.zoo.load("world-llava")


def shipped(name: str) -> None:
    if name not in weights.stored():
        pytest.skip(f"the weights of {name} are not in the package yet")


@functools.cache
def accuracy(group: str, *specs: str) -> float:
    """In percent, on the questions of ``group``."""
    types, questions = {
        "image": (KINDS_OF_TYPES["image"], IMAGE),
        "many images": (KINDS_OF_TYPES["image"], 400),
        "other_kind": (("other_kind",), HOPS),
        "video": (KINDS_OF_TYPES["video"], VIDEO),
    }[group]
    return 100 * tr.zoo.evaluate(model(), *specs, questions=questions, types=types, batch=32)["accuracy"]


# -- before the language model: 20 of 196 tokens
@pytest.mark.slow
def test_random_dropping_costs_25_points() -> None:
    assert accuracy("image") - accuracy("image", "random@projector:keep=20") >= 25


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fastervlm:keep=20", "visionzip:keep=20"])
def test_class_attention_costs_8_points_at_most(spec: str) -> None:
    assert accuracy("image") - accuracy("image", spec) <= 8


@pytest.mark.slow
def test_diversity_costs_8_points_at_most() -> None:
    """Nearly all of it where everything is counted: twenty tokens unlike each other show every thing, but the model
    tells how many there are by how much it sees of them."""
    assert accuracy("many images") - accuracy("many images", "divprune:keep=20") <= 8


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_class_attention_of_the_first_layers_is_useless(layer: int) -> None:
    """As in large encoders: a method that reads an early layer by mistake is found out."""
    early = accuracy("image", f"fastervlm:keep=20,layer={layer}")
    assert early <= accuracy("image", "random@projector:keep=20") - 10
    assert accuracy("image", "fastervlm:keep=20,layer=2") >= early + 40


# -- inside the language model: questions whose answer hangs on two things, 20 of 196 tokens
@pytest.mark.slow
def test_attention_of_the_last_token_knows_the_second_hop_before_layer_2_and_not_before_layer_1() -> None:
    early, late = (
        accuracy("other_kind", f"fastv:layer={n},keep=20")
        - accuracy("other_kind", f"random@language:layer={n},keep=20")
        for n in (1, 2)
    )
    assert late >= 20
    assert early < 10  # before layer 1 the ranking knows the first thing only


# -- video: a quarter of the tokens of every frame
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fastervlm:keep=0.25", "evs:keep=0.25"])
def test_class_attention_and_change_beat_random_on_video(spec: str) -> None:
    assert accuracy("video", spec) >= accuracy("video", "random@projector:keep=0.25") + 5


# -- the card
@pytest.mark.slow
def test_accuracy_is_the_cards() -> None:
    card = model().card
    got = tr.zoo.evaluate(model(), questions=400, batch=32)
    assert abs(got["accuracy"] - card["accuracy"]) <= 0.03
    assert set(got) <= set(card)
    assert card["steps"] == sum(stage.schedule.steps for stage in world_llava.STAGES) == card["curve"]["step"][-1]
    assert {"command", "minutes", "data", "limits"} <= set(card)


def test_damaged_weights_are_an_error_that_says_so(tmp_path) -> None:
    shipped("world-llava")
    for file in weights.FOLDER.glob("world-llava.*"):
        shutil.copy(file, tmp_path)
    file = tmp_path / "world-llava.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"world-llava.safetensors are damaged: sha256.*reinstall"):
        tr.zoo.load("world-llava", folder=tmp_path)


def test_the_tower_is_the_shipped_encoder() -> None:
    encoder = tr.zoo.load("world-vit").model
    tower = model().model.model.vision_tower.state_dict()
    want = world_vit.as_clip(encoder).state_dict()
    assert {k.removeprefix("vision_model."): v.tolist() for k, v in tower.items()} == {
        k.removeprefix("vision_model."): v.tolist() for k, v in want.items()
    }


# -- the training
class Enough(Exception):  # noqa: N818 - it is no error
    """The first point of the curve is there."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["world-vit", "world-llava"])
def test_training_again_gives_the_first_point_of_the_recorded_curve(name: str, tmp_path) -> None:
    """Some minutes. The recorded run was compiled and on another machine, maybe, so it rounded differently."""
    shipped(name)
    recorded = weights.read_card(name)["curve"]
    rows = []

    def report(row) -> None:
        rows.append(row)
        raise Enough

    train = functools.partial(world_vit.train, tmp_path)
    if name == "world-llava":
        train = functools.partial(world_llava.train, tmp_path, encoder=tr.zoo.load("world-vit").model)
    with pytest.raises(Enough):
        train(report=report)
    first = training.curve(tmp_path)
    assert first["step"] == [rows[0]["step"]] == recorded["step"][:1]
    assert first["loss"][0] == pytest.approx(recorded["loss"][0], rel=0.03)
    assert first["accuracy"][0] == pytest.approx(recorded["accuracy"][0], abs=0.08)
