"""Adapters: one file per model family. They know models and no methods.

An adapter module offers ``towers(model)``, which yields the vision transformers it finds, ``attach(tower, reducers,
undo)`` and ``FAMILIES``, the names shown to users. Only the adapters of libraries that are loaded already are
imported: a model instance cannot exist without its library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import nn

from tokenreduce.adapters.encoders.handing import attach_hands
from tokenreduce.adapters.encoders.pixels import deviations_of
from tokenreduce.adapters.encoders.readers import VLMS, hands_of, is_vlm, outside, own_code, strictest
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.core.reducer import Reducer

__all__ = ["Description", "attach", "describe", "encoder_refusal", "module_of", "supported"]

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


def _adapters() -> Iterator[ModuleType]:
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


def _towers(model: nn.Module, language: Any = None) -> list[tuple[ModuleType, Tower]]:
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
    found = [(adapter, tower) for adapter in _adapters() for tower in adapter.towers(model)]
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


def _unsupported(model: nn.Module) -> TypeError:
    known = "; ".join(f"{library}: {', '.join(names)}" for library, names in supported().items())
    reasons = (r for a in _adapters() for m in model.modules() if (r := getattr(a, "refusal", _nothing)(m)))
    if reason := next(reasons, None):
        return TypeError(reason)
    if (odd := next((m for m in model.modules() if is_vlm(m)), None)) is not None:
        return outside(odd)
    return TypeError(f"no adapter for {type(model).__name__}. Supported are models that contain one of: {known}")


def attach(model: nn.Module, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Find the model's sites and attach ``reducers``; every change goes through ``undo``.

    Raises ``TypeError`` for a model without adapter and ``ValueError`` for a stage that it does not have.
    """
    if denoisers := _denoisers(model):
        importlib.import_module("tokenreduce.adapters.diffusion.attach").attach(denoisers, reducers, undo)
        return
    language = _language(model)
    towers = _towers(model, language)
    if not towers and language is None:
        raise _unsupported(model)
    stages = _stages(towers, language)
    for reducer in reducers:
        if reducer.stage not in stages:
            raise ValueError(
                f"{reducer.name} acts at stage {reducer.stage}, which is not available on {type(model).__name__}"
                f"{_why_not(model, language, reducer.stage)} (stages there: {', '.join(stages)}); "
                f"tr.list_methods(stage='{stages[0]}') lists what fits"
            )
    _check_frames(model, reducers, towers, language)
    _attach_towers(model, towers, language, reducers, undo)


def _attach_towers(model: nn.Module, towers: Any, language: Any, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """:func:`attach` for vision transformers and language models that have the stages of ``reducers``."""
    if language is not None and language.how == "table":
        importlib.import_module("tokenreduce.adapters.language.attach").attach(language, reducers, undo, towers)
        return
    if language is not None:
        inner = set(language.inner.modules())
        own = [(a, t) for a, t in towers if t.module in inner]
        towers = [(a, t) for a, t in towers if t.module not in inner]  # beside it
        mine = reducers if own else tuple(r for r in reducers if r.stage != "encoder")
        if mine:
            early = all(r.stage in ("projector", "encoder") for r in mine)
            where = importlib.import_module(f"tokenreduce.adapters.language.{'generic.' if early else ''}attach")
            where.attach(language, mine, undo, own)
        reducers = tuple(r for r in reducers if r.stage == "encoder")
        if not reducers or not towers:
            return
    elif undo.logits == "caller":
        raise ValueError(f"logits='caller' is for image/video language models, not for {type(model).__name__}")
    for adapter, tower in towers:
        resizing = any(r.acting_position() == "input" and not r.drops_at_input for r in reducers)
        if own_code(tower.module) and not tower.resizes and resizing:
            raise ValueError(
                f"{type(tower.module).__name__} lays its patches out in code of its own, so it cannot be resized here; "
                "give the model smaller images instead"
            )
        adapter.attach(tower, reducers, undo)
        if not getattr(adapter, "EXPANDS", False):  # those that do hand out all tokens by themselves
            attach_hands(tower, undo)


def _why_not(model: nn.Module, language: Any, stage: str) -> str:
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
        reasons = (r for a in _adapters() for m in inner if (r := getattr(a, "refusal", _nothing)(m)))
        if reason := next(reasons, None):
            return reason
    return _generic().why_not(language, inside) or ""


#: Models whose language model gets class tokens of frames among the visual tokens.
_WITH_CLASS = ("VideoLlavaModel",)


def _check_frames(model: nn.Module, reducers: tuple[Reducer, ...], towers: Any, language: Any) -> None:
    """Raise ``ValueError`` for methods across frames where frames of a video do not run through one tower."""
    across = [r for r in reducers if r.stage == "encoder" and (r.merges_frames or getattr(r, "frames", 1) > 1)]
    if not across:
        return
    why = None
    if language is None:
        why = f"{type(model).__name__} does not see videos frame by frame"
    elif not hasattr(language.inner, "get_video_features"):
        why = f"{language.family} takes a video as single images"
    elif any(tower.rope and not getattr(adapter, "EXPANDS", False) for adapter, tower in towers):
        why = "its tower has rotary positions"
    elif across[0].merges_frames and (language.how != "table" or any(hasattr(a, "EXPANDS") for a, _ in towers)):
        why = f"{language.family} packs frames, or runs them in an order that is not known"
    elif across[0].merges_frames and type(language.inner).__name__ in _WITH_CLASS:
        why = f"{language.family} gives its language model the class token of every frame, too"
    if why is not None and across[0].merges_frames:
        raise ValueError(
            f"{across[0].spec()} cannot act here: it merges frames in vision towers that see those of a video as a "
            f"batch (LLaVA-OneVision, LLaVA-NeXT-Video), and {why}; choose a method for videos before the "
            f"language model (evs, holitom, fastvid)"
        )
    if why is not None:
        raise ValueError(
            f"{across[0].spec()}: frames is for vision towers that see the frames of a video one by one "
            f"(LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA, Qwen-VL), and {why}; leave frames out"
        )
    looking = [r for r in reducers if r.stage != "encoder" and "tower" in r.required()]
    if looking:
        raise ValueError(
            f"{looking[0].spec()} looks at what the tower saw of every frame, of which {across[0].spec()} makes one; "
            "choose a method on embeddings, or leave frames out"
        )


def default_stage(model: nn.Module) -> str:
    """The stage that short names of baselines mean on ``model``: "encoder", "projector" where a language model
    follows, "diffusion" in a denoiser."""
    if _denoisers(model):
        return "diffusion"
    return "encoder" if _language(model) is None else "projector"


def _language(model: nn.Module) -> Any:
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


def _denoisers(model: nn.Module) -> tuple[Any, ...]:
    """The denoisers of diffusers inside ``model``."""
    if "diffusers.models.modeling_utils" not in sys.modules:
        return ()
    return importlib.import_module("tokenreduce.adapters.diffusion.find").denoisers(model)  # type: ignore[no-any-return]


def _stages(towers: Any, language: Any) -> tuple[str, ...]:
    if language is None:
        return ("encoder",)
    stages: tuple[str, ...] = language.stages
    return (*stages, "encoder") if towers else stages


#: What the code behind a tower is given, see :mod:`tokenreduce.adapters.encoders.readers`.
_HANDED = {
    "all": "all are handed out again, merged ones as copies (what reads them counts on that)",
    "keys": "a decoder attends to them: merged ones are handed out as copies, dropped ones not",
}


@dataclass(frozen=True)
class Description:
    """What can act where in a model. ``print`` shows a table; ``towers`` has the facts."""

    model: str
    towers: tuple[Tower, ...]
    active: tuple[Reducer, ...]
    language: Any = None
    #: Decoder layers of a patched model with the steps that act there, where asked for.
    layers: tuple[Any, ...] = ()
    #: What ``auto:`` stood for, and why.
    note: str = ""
    denoisers: tuple[Any, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        if self.denoisers:
            return ("diffusion",)
        return _stages(self.towers, self.language)

    def methods(self, stage: str | None = None) -> list[str]:
        """Methods of ``stage`` (by default the first that the model has) that its sites can serve."""
        from tokenreduce.core.registry import get_class, list_methods

        stage = self.stages[0] if stage is None else stage
        if stage not in self.stages or (self.language is not None and not self.language.served):
            return []
        given: list[Any] = [t.evidence for t in self.towers]
        if stage == "diffusion":
            return list_methods(stage=stage)
        if stage != "encoder":
            given = [self.language.projector if stage == "projector" else self.language.evidence]
        return [
            name
            for name in list_methods(stage=stage)
            if all(need in evidence for evidence in given for need in get_class(name, stage).needs)
            and (stage != "encoder" or _fits_input(get_class(name, stage), self.towers, self._films()))
        ]

    def _films(self) -> bool:
        """Whether frames of a video run through one tower as a batch."""
        known: Any = self.language
        return (
            known is not None and known.how == "table" and hasattr(known.inner, "get_video_features")
            and type(known.inner).__name__ not in _WITH_CLASS
            and all(t.grid is not None and not t.rope for t in self.towers)
        )  # fmt: skip

    def __str__(self) -> str:
        lines = [self.model]
        for t in self.towers:
            where = t.name or "(the model itself)"
            sides = "x".join(str(side) for side in t.grid or ())
            grid = "set by the image" if t.grid is None else f"{t.prefix} + {sides} = {t.tokens}"
            lines += [
                f"  encoder  {where}: {t.family}, {len(t.blocks)} layers, tokens {grid}",
                f"           class token: {'yes' if t.cls else 'no'}; evidence: {', '.join(t.evidence)}"
                + (f"; keys are {t.rope}-RoPE" if t.rope else ""),
            ]
            if t.hands != "own":
                lines.append(f"           its tokens: {_HANDED['keys' if t.hands == 'keys' else 'all']}")
        if self.language is not None:
            where = self.language.name or "(the model itself)"
            lines += [
                f"  projector {where}: visual tokens of every image at the entry of the language model; "
                f"evidence: {', '.join(('features', *self.language.projector))}",
            ]
            if "language" in self.language.stages:
                lines.append(
                    f"  language {where}: {self.language.family}, {len(self.language.layers)} layers; "
                    f"evidence: {', '.join(self.language.evidence)}"
                )
            if "cache" in self.language.stages:
                lines.append(
                    f"  cache    {where}: keys and values of every layer, thinned behind the prompt or in decode"
                )
            lines += [f"  note     {where}: {limit}" for limit in self.language.limits]
        for d in self.denoisers:
            levels = ", ".join(f"{blocks} at 1/{level}" for level, blocks in d.levels().items())
            lines.append(f"  diffusion {d.name or '(the model itself)'}: {d.family}, transformer blocks: {levels}")
        for stage in self.stages:
            lines.append(f"  methods  {stage}: {', '.join(self.methods(stage))}")
        lines.append(f"  active   {' + '.join(r.spec() for r in self.active) or 'none'}")
        lines += [f"  chosen   {self.note}"] if self.note else []
        lines += [f"  steps    {site}" for site in self.layers]
        return "\n".join(lines)

    __repr__ = __str__


def _fits_input(method: type[Reducer], towers: tuple[Tower, ...], frames: bool) -> bool:
    """Whether towers take the images of a method that makes them smaller, have the blocks of one that sets tokens
    aside, two in front of a third, and see ``frames`` as a batch for one that merges them, if it is one."""
    if method.rebuilds and any(len(t.blocks) < 3 for t in towers):
        return False
    if method.merges_frames:
        return frames
    return method.position != "input" or "pixels" in method.needs or all(t.resizes for t in towers)


def describe(model: Any, *, detail: bool = False) -> Description:
    """The sites of ``model``; with ``detail``, what happens at each decoder layer of a patched one, in order. Raises
    ``TypeError`` for a model without adapter."""
    from tokenreduce.core.undo import note_of, reducers_of

    model = module_of(model)
    if denoisers := _denoisers(model):
        return Description(type(model).__name__, (), reducers_of(model), note=note_of(model), denoisers=denoisers)
    language = _language(model)
    towers = tuple(t for _, t in _towers(model, language))
    if not towers and language is None:
        raise _unsupported(model)
    layers: tuple[Any, ...] = ()
    if detail and language is not None:
        layers = tuple(importlib.import_module("tokenreduce.adapters.language.site").sites_in(language.layers))
    return Description(type(model).__name__, towers, reducers_of(model), language, layers, note_of(model))
