"""Models that are small or cannot be made narrow: they run as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokenreduce.common.model_names import options_of
from tokenreduce.estimation.scale import Scale
from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.estimation.timm_subjects import encoder_sites, no_frames

__all__ = ["as_it_is", "embedded", "open_clip"]

#: Inputs of the embedded models.
SIZES = {
    "digits-vit": (1, 28, 28), "world-vit": (3, 112, 112), "world-llava": (3, 112, 112), "world-vit-2": (3, 224, 224),
    "world-llava-2": (3, 224, 224), "world-clip-2": (3, 224, 224),
}  # fmt: skip


def embedded(name: str, ask: Ask) -> Subject:
    """A trained model of the package. Raises ``ValueError`` for another image size, or frames."""
    from tokenreduce import zoo
    from tokenreduce.estimation.hf_subjects import language_subject

    no_frames(name, ask)
    size = SIZES[name]
    if ask.image not in (None, (size[2], size[1])):
        raise ValueError(f"{name} takes images of {size[2]}x{size[1]}, not {'x'.join(map(str, ask.image or ()))}")
    model = zoo.load(name).model
    if name.startswith("world-llava"):
        return language_subject(name, model, model, Scale.between(model, model, {}), ask, lambda: model)
    if name == "world-clip-2":  # pictures alone: a text is read once for all of them
        tower: Any = model.vision_model
        return as_it_is(name, name, tower, size, "pixel_values")
    return as_it_is(name, name, model, size)


def open_clip(name: str, body: str, ask: Ask) -> Subject:
    """The vision part of an open_clip model, of random weights. Raises ``ValueError`` for an unknown one."""
    try:
        import open_clip as library
    except ImportError as error:
        raise ImportError("open_clip is not installed: pip install 'tokenreduce[open_clip]'") from error
    no_frames(name, ask)
    source, _, text = body.partition("?")
    model_name = source.partition("/")[0].partition("@")[0]
    if model_name not in library.list_models():
        raise ValueError(f"open_clip has no model {model_name!r}; open_clip.list_models() lists them")
    size = options_of(name, text).get("image_size") if ask.image is None else (ask.image[1], ask.image[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = library.create_model(model_name, pretrained=None, force_image_size=size)
    visual = made.visual.eval()
    side = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    return as_it_is(name, model_name, visual, (3, *side))


def as_it_is(name: str, title: str, model: nn.Module, size: tuple[int, ...], word: str = "x") -> Subject:
    """An encoder of images of ``size`` (C,H,W), its argument ``word``, that runs itself, on its device and in its
    dtype."""
    weights = next(model.parameters())
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(weights.device, weights.dtype)
    return Subject(
        name, title, model, Scale.between(model, model, {}), sum(p.numel() for p in model.parameters()),
        {word: x}, lambda m, inputs: m(**inputs), lambda: model, encoder_sites, f"one image of {size[2]}x{size[1]}",
    )  # fmt: skip
