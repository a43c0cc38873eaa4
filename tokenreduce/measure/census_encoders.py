"""Which vision encoders of the installed libraries can be reduced, found out by patching one of every kind.

Models are built on the meta device, where they hold no weights, so that the table costs seconds. A model counts as
supported where ``tr.patch`` takes it; that outputs are right is what the tests of the adapters say.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tokenreduce.measure.census import Row

__all__ = ["LIBRARIES", "census_encoders"]

LIBRARIES = ("timm", "open_clip", "transformers", "torchvision")
#: Libraries whose rows go by the class that an architecture turns out to be.
_BY_CLASS = ("timm", "torchvision")
#: A method that looks at keys, which every supported encoder can show.
_METHOD = "tome:r=1"


def census_encoders(library: str) -> list[Row]:
    """One row for every kind of vision encoder of ``library``, by name.

    A kind is a model class in timm, transformers and torchvision. In open_clip it is what a configuration says besides
    sizes, and goes by the first name that has it. Image/video language models of transformers are left out.

    Raises ``ValueError`` for another library and ``ImportError`` where it is not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library={library!r}: choose one of {', '.join(LIBRARIES)}")
    makers = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers, "torchvision": _torchvision}
    rows: dict[str, Row] = {}
    with _quiet():
        for name, build in makers[library]():
            try:
                with torch.device("meta"):
                    model = build()
            except Exception as error:  # a default configuration that the library itself cannot build
                reason = f"{library} cannot build it by its defaults ({type(error).__name__})"
                rows.setdefault(name, Row(library, name, "refused", (), reason))
                continue
            name = type(model).__name__ if library in _BY_CLASS else name
            if name not in rows:
                rows[name] = _row(library, name, model)
    return [rows[name] for name in sorted(rows)]


def _row(library: str, name: str, model: nn.Module) -> Row:
    from tokenreduce.adapters import describe
    from tokenreduce.patching import patch, unpatch

    try:
        patch(model, _METHOD)
        unpatch(model)
    except (TypeError, ValueError) as error:
        return Row(library, name, "refused", (), _short(str(error)))
    towers = describe(model).towers
    found = any(getattr(getattr(tower, "layout", None), "found", None) is not None for tower in towers)
    return Row(library, name, "discovered" if found else "table", ("encoder",))


def _short(reason: str) -> str:
    """The list of what is supported is the table itself."""
    return reason.partition(". Supported are")[0].partition(". Models around a tower that are supported")[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say while models are built."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- what there is -----------------------------------------------------------------------------------------------------
Kinds = Iterator[tuple[str, Callable[[], nn.Module]]]


def _timm() -> Kinds:
    """The first architecture of every module of timm, and of every beginning of a name in it."""
    import timm

    seen = set()
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            kind = (module, name.partition("_")[0])
            if kind not in seen:
                seen.add(kind)
                yield name, lambda name=name: timm.create_model(name)  # type: ignore[misc]


def _torchvision() -> Kinds:
    from torchvision import models

    for name in models.list_models(module=models):
        yield name, lambda name=name: models.get_model(name, weights=None)  # type: ignore[misc]


def _open_clip() -> Kinds:
    import open_clip

    sizes = {"layers", "width", "head_width", "mlp_ratio", "image_size", "patch_size", "timm_model_name"}
    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        tower = str(vision.get("timm_model_name", "")).split("_")
        flags = {k: v for k, v in vision.items() if k not in sizes and not isinstance(v, float)}
        nested = isinstance(vision.get("layers"), list)
        kind = (tower[0], "relpos" in tower, nested, json.dumps(flags, sort_keys=True), "multimodal_cfg" in config)
        if kind not in seen:
            seen.add(kind)
            yield name, lambda config=config: _clip(config)  # type: ignore[misc]


def _clip(config: dict[str, Any]) -> nn.Module:
    """The model of a configuration, with a small text tower of its own: text has no part in this."""
    import open_clip

    text = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=1)
    vision = {k: v for k, v in config["vision_cfg"].items() if k != "timm_model_pretrained"}
    given = dict(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text)
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**given, multimodal_cfg={**text, "attn_pooler_heads": 2})
    return open_clip.CustomTextCLIP(**given) if config.get("custom_text") else open_clip.CLIP(**given)


def _transformers() -> Kinds:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES, MODEL_MAPPING_NAMES

    names: set[str] = set()
    for table in (MODEL_MAPPING_NAMES, MODEL_FOR_BACKBONE_MAPPING_NAMES):
        for found in table.values():
            names |= {found} if isinstance(found, str) else set(found)
    for name in sorted(names - {"TimmBackbone", "TimmWrapperModel"}):
        try:
            kind = getattr(transformers, name)
            pixels = {"pixel_values", "pixel_values_videos"}.intersection(inspect.signature(kind.forward).parameters)
        except (AttributeError, ImportError, RuntimeError):  # needs a package that is not there
            continue
        if pixels and not _speaks(kind):
            yield name, lambda kind=kind: kind(_small(kind.config_class()))  # type: ignore[misc]


def _speaks(kind: Any) -> bool:
    """Whether a class of transformers is one of the language models that see."""
    is_vlm = importlib.import_module("tokenreduce.adapters.encoders.readers").is_vlm
    takes = inspect.signature(kind.forward).parameters
    if "input_ids" not in takes:
        return False
    try:
        with torch.device("meta"):
            return bool(is_vlm(kind(_small(kind.config_class()))))
    except Exception:
        return True


def _small(config: Any) -> Any:
    """``config`` with two layers, where it says how many."""
    for name in ("", "vision_config", "text_config"):
        part: Any = getattr(config, name, None) if name else config
        if isinstance(getattr(part, "num_hidden_layers", None), int):
            part.num_hidden_layers = min(2, part.num_hidden_layers)
    return config
