"""What is in a model: its vision towers, its language model, its denoisers, and why something cannot be served.

Only the adapters of libraries that are loaded already are imported: a model instance cannot exist without its library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

from tokenreduce.adapters.encoders.pixels import deviations_of
from tokenreduce.adapters.encoders.readers import VLMS, hands_of, is_vlm, outside, own_code, strictest
from tokenreduce.adapters.encoders.tower import Tower

__all__ = [
    "adapters", "default_stage", "denoisers_in", "encoder_refusal", "language_in", "module_of", "stages_of",
    "supported", "towers_in", "unsupported", "why_not",
]  # fmt: skip

#: library, or the part of it that its models need -> adapter modules that need it
LIBRARIES: dict[str, tuple[str, ...]] = {
    "timm": ("tokenreduce.adapters.encoders.timm", "tokenreduce.adapters.encoders.timm_others"),
    "open_clip": ("tokenreduce.adapters.encoders.open_clip",),
    "torchvision": ("tokenreduce.adapters.encoders.torchvision",),
    "transformers": (
        "tokenreduce.adapters.encoders.hf",
        "tokenreduce.adapters.encoders.qwen",
        "tokenreduce.adapters.encoders.packed_found",
    ),
    "diffusers.models.modeling_utils": ("tokenreduce.adapters.diffusion.find",),
}


def adapters() -> Iterator[ModuleType]:
    """Adapter modules of the libraries that are loaded."""
    for library, names in LIBRARIES.items():
        if library in sys.modules:
            for name in names:
                yield importlib.import_module(name)


def supported() -> dict[str, tuple[str, ...]]:
    """Names of the model families per library, for messages and documentation; imports nothing heavy."""
    return {
        "timm": (
            "VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, ...)",
            "Eva (EVA02, DINOv3, RoPE ViTs)",
            "BEiT",
            "relative-position ViTs",
            "NaFlexViT",
            "CaiT",
            "the towers of Qwen3-VL, Gemma 4 and DeepSeek-OCR",
        ),
        "open_clip": (
            "VisionTransformer",
            "CLIP, CustomTextCLIP and CoCa with it",
            "CLIP and CustomTextCLIP with a timm tower",
        ),
        "torchvision": ("VisionTransformer",),
        "transformers": (
            "ViT",
            "CLIP",
            "SigLIP",
            "SigLIP2",
            "DINOv2",
            "DINOv3",
            "VideoMAE",
            "ViViT",
            "vision transformers that are built alike (DeiT, BEiT, AIMv2, BLIP, MetaCLIP2, V-JEPA 2, ...)",
            *VLMS,
        ),
        "diffusers": ("UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL)", "ControlNetModel"),
    }


def towers_in(model: nn.Module, language: Any = None) -> list[tuple[ModuleType, Tower]]:
    """Every tower in ``model`` with its adapter, and who reads its tokens; a tower inside another one belongs to the
    outer. The towers of a language model with visual tokens are served by what acts before it.

    Raises ``TypeError`` for a tower whose tokens are read in a way that nobody checked, and for one without layers.
    """
    outer = [(a, replace(t, std=deviations_of(model, t.module))) for a, t in _outer(model)]
    if language is not None and language.how == "table":
        return [(a, t) for a, t in outer if _served(language.inner, t)]
    inside = _inside(language, outer)
    beside = [(a, _placed(model, a, t)) for a, t in outer if not any(t is i for _, i in inside)]
    return [*_generic().served(language, inside), *beside] if inside else beside


def _outer(model: nn.Module) -> list[tuple[ModuleType, Tower]]:
    """Every tower in ``model`` that is inside no other one. Raises ``TypeError`` for one without layers."""
    found = [(adapter, tower) for adapter in adapters() for tower in adapter.towers(model)]
    if (bare := next((t for _, t in found if not t.blocks), None)) is not None:
        raise TypeError(f"{bare.family} has no layers, so there is nowhere to reduce tokens")
    names = [t.name for _, t in found]
    return [(a, t) for a, t in found if not any(t.name != n and t.name.startswith(n + "." if n else "") for n in names)]


def _inside(language: Any, towers: list[tuple[ModuleType, Tower]]) -> list[tuple[ModuleType, Tower]]:
    """Those of ``towers`` that are inside a discovered language model."""
    if language is None or language.how == "table":
        return []
    modules = set(language.inner.modules())
    return [(a, t) for a, t in towers if t.module in modules]


def _generic() -> Any:
    return importlib.import_module("tokenreduce.adapters.language.generic.encoder")


def _served(inner: nn.Module, tower: Tower) -> bool:
    """Whether a tower of a language model runs as its library wrote it, so that its tokens can be given back."""
    if tower.hands != "own":  # what the tower itself does behind its blocks needs all tokens
        return False
    try:
        return hands_of(inner, tower, known=(type(inner).__name__,)) in ("own", "all")
    except TypeError:
        return False


def _placed(model: nn.Module, adapter: ModuleType, tower: Tower) -> Tower:
    maps = isinstance(tower.module, getattr(adapter, "BACKBONES", ()))
    hands = strictest(hands_of(model, tower, maps), tower.hands)
    fixed = hands in ("maps", "inside") or "_embeds" in own_code(tower.module)  # lays its patches out itself
    return replace(tower, hands=hands, resizes=tower.resizes and not fixed)


def _nothing(module: nn.Module) -> None:
    """What an adapter without reasons of its own says of a module."""


def unsupported(model: nn.Module) -> TypeError:
    """The error that says why ``model`` has nothing to reduce, and what is supported."""
    known = "; ".join(f"{library}: {', '.join(names)}" for library, names in supported().items())
    reasons = (r for a in adapters() for m in model.modules() if (r := getattr(a, "refusal", _nothing)(m)))
    if reason := next(reasons, None):
        return TypeError(reason)
    if (odd := next((m for m in model.modules() if is_vlm(m)), None)) is not None:
        return outside(odd)
    return TypeError(f"no adapter for {type(model).__name__}. Supported are models that contain one of: {known}")


def why_not(model: nn.Module, language: Any, stage: str) -> str:
    """The reason why a discovered language model has no such stage."""
    if language is None or language.how == "table":
        return ""
    why = language.why_not_inside if stage in ("language", "cache") else encoder_refusal(model, language)
    return f": {why}" if why else ""


def encoder_refusal(model: nn.Module, language: Any) -> str:
    """Why nothing can act in the tower of a discovered ``language`` model, "" where something can."""
    inside = _inside(language, _outer(model))
    if not inside:
        inner = list(language.inner.modules())
        reasons = (r for a in adapters() for m in inner if (r := getattr(a, "refusal", _nothing)(m)))
        if reason := next(reasons, None):
            return reason
    return _generic().why_not(language, inside) or ""


def default_stage(model: nn.Module) -> str:
    """The stage that short names of baselines mean on ``model``: "encoder", "projector" where a language model
    follows, "diffusion" in a denoiser."""
    if denoisers_in(model):
        return "diffusion"
    return "encoder" if language_in(model) is None else "projector"


def language_in(model: nn.Module) -> Any:
    """The language model with visual tokens inside ``model``, or None."""
    if "transformers" not in sys.modules:
        return None
    return importlib.import_module("tokenreduce.adapters.language.find").find(model)


def module_of(model: Any) -> nn.Module:
    """``model`` itself, or what is patched of a pipeline of diffusers: its UNet.

    Raises ``TypeError`` for what is neither, and for a pipeline without a UNet.
    """
    if isinstance(model, nn.Module):
        return model
    if "diffusers.pipelines.pipeline_utils" in sys.modules:
        found = importlib.import_module("tokenreduce.adapters.diffusion.pipeline").module_of(model)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise TypeError(f"tokenreduce expects a torch.nn.Module, or a pipeline of diffusers, not {type(model).__name__}")


def denoisers_in(model: nn.Module) -> tuple[Any, ...]:
    """The denoisers of diffusers inside ``model``."""
    if "diffusers.models.modeling_utils" not in sys.modules:
        return ()
    return importlib.import_module("tokenreduce.adapters.diffusion.find").denoisers(model)  # type: ignore[no-any-return]


def stages_of(towers: Any, language: Any) -> tuple[str, ...]:
    """Stages at which something can act; towers alone are encoders."""
    if language is None:
        return ("encoder",)
    stages: tuple[str, ...] = language.stages
    return (*stages, "encoder") if towers else stages
