"""Models of transformers from their config: encoders, and image/video language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.estimation.narrow import heads_of, narrowed, vision_heads
from tokenreduce.estimation.ops import DECODE, PREFILL, PROJECTOR, TOWER
from tokenreduce.estimation.prompts import prompt_of
from tokenreduce.estimation.recorder import Sites
from tokenreduce.estimation.scale import Scale
from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.estimation.timm_subjects import encoder_sites, no_frames
from tokenreduce.patching import describe

__all__ = ["LONGEST", "from_config", "language_subject", "of_config"]

#: Visual tokens of a clip that the narrow model is given at most; a longer clip is tried on fewer frames.
LONGEST = 8192


def from_config(name: str, source: str, ask: Ask) -> Subject:
    """See :func:`~tokenreduce.estimation.subjects.subject_of`."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'tokenreduce[hf]'") from error
    folder = Path(source).expanduser()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder) if folder.exists() else source)
    except ImportError:
        raise
    except Exception as error:  # whatever a broken config makes the library raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"cannot read the config of {name}: {first} Fix: give a folder with a config.json, or a Hub id where there "
            "is a network (or the hub's cache)"
        ) from error
    return of_config(name, config, ask)


def of_config(name: str, config: Any, ask: Ask) -> Subject:
    """By a config that was read, which may be changed; errors are those of :func:`from_config`."""
    import transformers

    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        kind: Any = transformers.AutoModelForImageTextToText
        true, narrow = _pair(kind, config)
        text, vision = config.get_text_config(), config.vision_config
        small = narrowed(config)
        of_text = heads_of(small.get_text_config()), heads_of(text)
        of_vision = vision_heads(small.vision_config), vision_heads(vision)
        heads = {TOWER: of_vision, PROJECTOR: of_text, PREFILL: of_text, DECODE: of_text}
        made = Scale.between(narrow, true, heads)
        try:
            return language_subject(name, narrow, true, made, ask, lambda: _real(kind, config))
        except (RuntimeError, IndexError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{name}: a model of this config does not take its own image ({first}); check the config"
            ) from error
    no_frames(name, ask)
    if getattr(config, "vision_config", None) is not None:
        config = config.vision_config
    if getattr(config, "patch_size", None) is None or getattr(config, "num_channels", None) is None:
        raise ValueError(
            f"{name} has no vision part: its config is of a {config.model_type} model; give an image/video language "
            "model or a vision transformer"
        )
    if ask.image is not None and getattr(config, "image_size", None) is not None:
        if ask.image[0] != ask.image[1]:
            raise ValueError(f"{name} takes square images; give --image {ask.image[0]}x{ask.image[0]}")
        config.image_size = ask.image[0]
    true, narrow = _pair(transformers.AutoModel, config)
    heads = {TOWER: (vision_heads(narrowed(config)), vision_heads(config))}
    side = int(getattr(config, "image_size", None) or 224)
    x = torch.randn(1, config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    return Subject(
        name, name, narrow, Scale.between(narrow, true, heads), sum(p.numel() for p in true.parameters()),
        {"pixel_values": x}, lambda model, inputs: model(**inputs), lambda: _real(transformers.AutoModel, config),
        encoder_sites, f"one image of {side}x{side}",
    )  # fmt: skip


def _pair(kind: Any, config: Any) -> tuple[nn.Module, nn.Module]:
    """The true model on the meta device, and a narrow one of random weights."""
    with torch.device("meta"):
        true = kind.from_config(config).eval()
    return true, _real(kind, narrowed(config))


def _real(kind: Any, config: Any) -> nn.Module:
    """The true model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = kind.from_config(config).float().eval()
    return made


def language_subject(
    name: str, narrow: Any, true: Any, scale: Scale, ask: Ask, build: Callable[[], nn.Module]
) -> Subject:
    """An image/video language model and its prompt. Raises ``ValueError`` where no adapter knows it."""
    found = describe(narrow).language
    if found is None:
        raise ValueError(f"{name} ({type(narrow).__name__}) has no language model with visual tokens that is served")
    given = prompt_of(narrow, found.family, ask, found.ids)
    visual, share = _visual(given, found.ids), 1.0
    notes = []
    if visual > LONGEST and ask.frames:
        fewer = max(2, int(ask.frames * LONGEST / visual) // 2 * 2)
        given = prompt_of(narrow, found.family, replace(ask, frames=fewer), found.ids)
        share = _visual(given, found.ids) / visual
        notes.append(f"tried on {fewer} of {ask.frames} frames, and stretched")
    heads = heads_of(true.config.get_text_config())
    shown = f"one image of {_size(given, ask)}" if ask.frames is None else f"{ask.frames} frames"

    def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        return cache_of(model(**inputs, use_cache=True, logits_to_keep=1))

    return Subject(
        name, name, narrow, scale, sum(p.numel() for p in true.parameters()), given, forward, build, _sites, shown,
        visual, given["input_ids"].shape[1] - _visual(given, found.ids), share, (heads.keys, heads.width),
        given["input_ids"][:, -1:], notes,
    )  # fmt: skip


def _visual(given: dict[str, torch.Tensor], ids: tuple[int, ...]) -> int:
    row = given["input_ids"][0]
    return int(sum((row == i).sum() for i in set(ids)))


def _size(given: dict[str, torch.Tensor], ask: Ask) -> str:
    if ask.image is not None:
        return "x".join(map(str, ask.image))
    if "image_grid_thw" in given:
        return "1344x1008"
    if "image_sizes" in given:
        height, width = given["image_sizes"][0].tolist()
        return f"{width}x{height}"
    height, width = given["pixel_values"].shape[-2:]
    return f"{width}x{height}"


def _sites(model: Any) -> Sites:
    found = describe(model).language
    vision = found.vision
    towers = () if vision is None else vision.towers
    blocks = () if vision is None else tuple(b for group in vision.blocks for b in group)
    projector = None if vision is None else vision.projector
    return Sites(towers, blocks, found.text, found.layers, model.get_output_embeddings(), projector)
