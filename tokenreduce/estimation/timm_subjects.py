"""Vision transformers of timm, made narrow where timm lets them be."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from tokenreduce.common.model_names import options_of
from tokenreduce.estimation.ops import TOWER
from tokenreduce.estimation.recorder import Sites
from tokenreduce.estimation.scale import Heads, Scale
from tokenreduce.estimation.subject import Ask, Subject, heads_of_blocks
from tokenreduce.patching import describe

__all__ = ["HEADS", "WIDTH", "encoder_sites", "from_timm", "no_frames"]

#: Heads of a narrow tower and their width, which no other dimension is likely to have.
HEADS, WIDTH = 3, 12


def from_timm(name: str, body: str, ask: Ask) -> Subject:
    """See :func:`~tokenreduce.estimation.subjects.subject_of`; ``img_size`` follows the image that is asked about."""
    import timm

    source, _, text = body.partition("?")
    model_name = source if source.startswith("hf-hub:") else source.partition("@")[0]
    options = options_of(name, text)
    for key in ("pretrained", "seed"):
        options.pop(key, None)
    if not timm.is_model(model_name.partition(".")[0]):
        close = difflib.get_close_matches(model_name.partition(".")[0], timm.list_models(), 3, 0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists them"
        raise ValueError(f"timm has no model {model_name!r}; {hint}")
    no_frames(name, ask)
    if ask.image is not None:
        options["img_size"] = (ask.image[1], ask.image[0])

    def build(**more: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.Module = timm.create_model(model_name, pretrained=False, **options, **more)
            return made.eval()

    try:
        with torch.device("meta"):
            true: Any = build()
    except (TypeError, AssertionError, ValueError) as error:
        given = ", ".join(f"{k}={v}" for k, v in options.items()) or "none"
        raise ValueError(f"{name}: timm does not make this model with these options ({given}): {error}") from error
    towers = describe(true).towers
    attention = getattr(towers[0].blocks[0], "attn", None)
    count = getattr(attention, "num_heads", None)
    narrow: nn.Module | None = None
    heads: dict[str, tuple[Heads, Heads]] = {}
    if isinstance(count, int):
        try:
            narrow = build(embed_dim=HEADS * WIDTH, num_heads=HEADS)
            scale = Scale.between(narrow, true, {TOWER: heads_of_blocks(HEADS, WIDTH, count, _width(true, count))})
        except (TypeError, AssertionError, ValueError, RuntimeError):
            narrow = None
    if narrow is None:
        narrow = build()
        scale = Scale.between(narrow, true, heads)
    size = getattr(getattr(true, "patch_embed", None), "img_size", None) or true.pretrained_cfg["input_size"][1:]
    x = torch.randn(1, true.pretrained_cfg["input_size"][0], *size, generator=torch.Generator().manual_seed(0))
    return Subject(
        name, model_name, narrow, scale, sum(p.numel() for p in true.parameters()), {"x": x},
        lambda model, inputs: model(**inputs), build, encoder_sites, f"one image of {size[1]}x{size[0]}",
    )  # fmt: skip


def _width(model: Any, heads: int) -> int:
    return int(model.embed_dim) // heads


def encoder_sites(model: nn.Module) -> Sites:
    """All of the model is one tower."""
    (tower, *_) = describe(model).towers
    return Sites((), tower.blocks)


def no_frames(name: str, ask: Ask) -> None:
    """Raises ``ValueError`` where frames are asked for and the model takes images."""
    if ask.frames is not None:
        raise ValueError(f"{name} takes images; --frames is for video language models, --batch for several images")
