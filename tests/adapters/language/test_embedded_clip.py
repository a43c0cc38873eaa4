"""Methods that read the question in the joint space of the CLIP that a language model names."""

from __future__ import annotations

import functools

import pytest
import torch

import tokenreduce as tr

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokenreduce.zoo.world2 import scene


@functools.cache
def vlm(name: str = "world-llava-2"):
    return tr.zoo.load(name)


def asked(question: str = "what color is the star", seed: int = 2_000_000_003):
    made = vlm()
    from PIL import Image

    image = Image.fromarray(scene(seed).image)
    return made.processor(text=f"<image> {question}", images=image, return_tensors="pt")


def kept(spec: str) -> torch.Tensor:
    """Which visual tokens stay, and what the trace says did it."""
    with tr.patched(vlm().model, spec), tr.record(vlm().model) as trace, torch.no_grad():
        vlm().model(**asked())
    return trace


@pytest.mark.parametrize("name", ["trim", "cdpruner"])
def test_a_model_names_its_clip(name: str) -> None:
    own = tr.get_method(f"{name}:keep=0.1")
    assert own.clip == "auto"
    assert own.spec() == f"{name}:keep=0.1"
    auto, named = kept(f"{name}:keep=0.1"), kept(f"{name}:keep=0.1,clip=world-clip-2,sign=1")
    plain, turned = kept(f"{name}:keep=0.1,clip=none"), kept(f"{name}:keep=0.1,sign=-1")
    plans = [trace.plans[0] for trace in (auto, named, plain, turned)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2], "relevance in the language model's space is another one"
    assert plans[0] != plans[3], "a sign that is given is kept"
    assert "clip=world-clip-2" in str(auto.steps[0].method)
    assert "clip=none" in str(plain.steps[0].method)


def test_without_a_name_the_space_of_the_language_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    want = kept("trim:keep=0.1,clip=none").plans[0]
    monkeypatch.delattr(vlm().model.config, "clip_model")
    assert kept("trim:keep=0.1").plans[0] == want
    assert not hasattr(vlm("world-llava").model.config, "clip_model")


def test_the_clip_of_another_tower_is_refused() -> None:
    """Both worlds have towers of one width: nothing but the weights would show it."""
    with pytest.raises(ValueError, match="clip='world-clip-2' has another vision tower than this model; name the CLIP"):
        tr.patch(vlm("world-llava").model, "trim:keep=20,clip=world-clip-2")
    with pytest.raises(ValueError, match="clip='world-vit-2' is an embedded VisionTransformer, not a CLIPModel"):
        tr.patch(vlm().model, "trim:keep=20,clip=world-vit-2")
    tr.patch(vlm("world-llava").model, "trim:keep=20")  # neither left anything behind
    tr.unpatch(vlm("world-llava").model)


def test_everything_kept_changes_nothing() -> None:
    inputs = asked()
    with torch.no_grad():
        want = vlm().model(**inputs).logits
        with tr.patched(vlm().model, "trim:keep=1.0"):
            assert torch.equal(vlm().model(**inputs).logits, want)
        assert torch.equal(vlm().model(**inputs).logits, want)
