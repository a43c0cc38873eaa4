"""Training by name: steps, what each model takes, and the curve that its card remembers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenreduce.zoo import digits, weights, world_llava, world_vit
from tokenreduce.zoo.trainable import TRAINABLE, trainable


def test_steps_are_those_of_the_schedules() -> None:
    assert trainable("digits-vit").steps == digits.SCHEDULE.steps
    for name, module in (("world-vit", world_vit), ("world-llava", world_llava)):
        assert trainable(name).steps == sum(s.schedule.steps for s in module.STAGES)


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_is_recorded_is_what_the_card_says(name: str) -> None:
    told = trainable(name).recorded()
    made = weights.read_card(name).get("curve")
    assert (made is None) == (told == {})
    if made:
        assert list(told) == made["step"]
        assert told[made["step"][-1]] == (made["loss"][-1], made["accuracy"][-1])


def test_words_reach_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def train(folder, **given):
        seen.update(given, folder=folder)
        return torch.nn.Identity()

    monkeypatch.setattr(world_vit, "train", train)
    trainable("world-vit").train(tmp_path, minutes=2, workers=3, report=len)
    assert seen == {"folder": tmp_path, "device": "cpu", "stop_after": 2, "report": len, "workers": 3}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot train 'resnet'; trainable models: digits-vit"):
        trainable("resnet")
    with pytest.raises(ValueError, match="world-vit takes no encoder; it takes: workers, compiled"):
        trainable("world-vit").train(tmp_path, encoder=tmp_path)
    with pytest.raises(ValueError, match="nothing more"):
        trainable("digits-vit").train(tmp_path, workers=1)
