"""The shipped models of the second world are what their cards say, as far as they have learned."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import tokenreduce as tr
from tokenreduce.zoo import weights

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokenreduce.zoo import world2_batches, world_llava2, world_vit2
from tokenreduce.zoo.clip_twin import clip_state
from tokenreduce.zoo.trainable import trainable
from tokenreduce.zoo.world2 import VIDEO_TYPES
from tokenreduce.zoo.world_vit import pixels


@functools.cache
def model(name: str):
    if name not in weights.stored():
        pytest.skip(f"the weights of {name} are not in the package yet")
    return tr.zoo.load(name)


def test_all_weights_together_are_small_and_the_cards_are_complete() -> None:
    assert sum(f.stat().st_size for f in weights.FOLDER.glob("*.safetensors")) < 25e6
    for name in ("world-vit-2", "world-llava-2"):
        card = model(name).card
        assert {"command", "steps", "minutes", "data", "limits", "accuracy", "not_learned"} <= set(card)
        assert card["steps"] == card["curve"]["step"][-1]
        assert name in weights.learned()


def test_the_class_token_names_what_is_there() -> None:
    found = world_vit2.accuracy(model("world-vit-2").model, scenes=60)
    assert found["kinds"] >= 0.97
    assert found["characters"] >= 0.9


def test_the_class_token_looks_at_places_first_and_at_things_last() -> None:
    vit = model("world-vit-2").model
    made = world2_batches.sights(0, batch=8, seed=71, split="test", scenes=(world2_batches.FEW,))
    shows = torch.from_numpy((made.labels[:, 0] >= 0) | (made.labels[:, 2] >= 0))
    with torch.no_grad():
        rows = world_vit2.look(vit, pixels(made.pixels), rows=range(6))[2].exp().mean(2)
    paid = [float(layer[shows].sum() / len(layer)) for layer in rows]  # share of class attention on what is there
    assert max(paid[:2]) < 2.5 * float(shows.float().mean())
    assert min(paid[-2:]) > 0.8


def test_the_tower_is_the_shipped_encoder_bit_for_bit() -> None:
    tower = model("world-llava-2").model.model.vision_tower.state_dict()
    for name, value in clip_state(model("world-vit-2").model.state_dict()).items():
        assert torch.equal(value, tower[name]), name


@pytest.mark.slow
def test_patches_tell_kind_colour_and_character() -> None:
    """A linear layer, fitted on some scenes, reads on others what every patch shows: all 784 seen."""
    vit = model("world-vit-2").model
    rows = []
    with torch.no_grad():
        for i, split in enumerate(("train", "train", "train", "validation")):
            made = world2_batches.sights(i, batch=16, seed=70, split=split)
            x = world_vit2.look(vit, pixels(made.pixels))[0]
            rows.append((x[:, 1:].flatten(0, 1), torch.from_numpy(made.labels).transpose(1, 2).flatten(0, 1)))
    fit = torch.cat([x for x, _ in rows[:-1]]), torch.cat([y for _, y in rows[:-1]])
    mean, std = fit[0].mean(0), fit[0].std(0)
    for column, least in ((0, 0.9), (1, 0.95), (2, 0.9)):  # kind, colour, character
        x, y = fit[0][fit[1][:, column] >= 0], fit[1][fit[1][:, column] >= 0][:, column]
        head = torch.linalg.lstsq(
            torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1), torch.nn.functional.one_hot(y).float()
        ).solution
        x, y = rows[-1][0][rows[-1][1][:, column] >= 0], rows[-1][1][rows[-1][1][:, column] >= 0][:, column]
        guess = (torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1) @ head).argmax(-1)
        assert float((guess == y).float().mean()) >= least, world2_batches.Sights.__doc__


@pytest.mark.slow
def test_what_is_mastered_is_asserted_with_a_margin() -> None:
    """Whole answers by greedy ``generate``: 24 questions of every type that the card gives 90 % or more."""
    card = model("world-llava-2").card
    mastered = [t for t in card["learned"].split(", ") if t in world_llava2._EVEN]
    assert {"colour_of", "kind_of", "exist", "at_kind", "read", "letter", "cell"} <= set(mastered)
    _as_the_card_says(mastered)


@pytest.mark.slow
def test_what_is_mastered_about_clips_is_asserted_with_a_margin() -> None:
    """The same of clips of 16 frames, 196 tokens each."""
    mastered = [t for t in model("world-llava-2").card["learned"].split(", ") if t in VIDEO_TYPES]
    assert {"order", "first", "last", "direction", "appear"} <= set(mastered)
    _as_the_card_says(mastered, 12)


def _as_the_card_says(mastered: list[str], each: int = 24) -> None:
    card = model("world-llava-2").card
    got = tr.zoo.evaluate(model("world-llava-2"), questions=each * len(mastered), types=mastered, batch=each)
    assert got["accuracy"] >= np.mean([card[t] for t in mastered]) - 0.1
    for name in mastered:
        assert got[name] >= card[name] - (0.25 if each > 20 else 0.3), name


def test_an_average_counts_tied_weights_once() -> None:
    trained = world_llava2.build()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.zero_()
    trainable("world-llava-2").average(trained, weights.FOLDER, 0.25)
    before = tr.zoo.load("world-llava-2").model.state_dict()
    for name in ("lm_head.weight", "model.language_model.layers.3.mlp.up_proj.weight"):
        torch.testing.assert_close(trained.state_dict()[name], 0.75 * before[name])
    assert trained.lm_head.weight is trained.model.language_model.embed_tokens.weight
