from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenreduce.bench.models import load_model
from tokenreduce.bench.resolve import resolve
from tokenreduce.bench.safely import safetensors_only


def test_nothing_is_unpickled_inside(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    before = torch.load
    with safetensors_only(), pytest.raises(ValueError, match="stored as pickle"):
        torch.load(tmp_path / "weights.pt")
    assert torch.load is before
    with pytest.raises(ZeroDivisionError), safetensors_only():
        1 / 0  # noqa: B018
    assert torch.load is before


def test_a_pickled_checkpoint_of_a_model_is_refused(tmp_path: Path) -> None:
    import timm

    made = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    name = f"timm:vit_tiny_patch16_224@{tmp_path / 'weights.pth'}?img_size=32&depth=1"
    load_model(name)
    with safetensors_only(), pytest.raises((ValueError, OSError), match="pickle"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("digits-vit", ("image", "digits-vit")),
        ("world-llava", ("language", "world-llava")),
        ("vit_tiny_patch16_224", ("image", "timm:vit_tiny_patch16_224")),
        ("timm:whatever", ("image", "timm:whatever")),
        ("open_clip:ViT-B-16/openai", ("image", "open_clip:ViT-B-16/openai")),
    ],
)
def test_names_mean_a_kind_and_a_loader(name: str, meant: tuple[str, str]) -> None:
    assert resolve(name) == meant


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model 'nothing'"):
        resolve("nothing")
