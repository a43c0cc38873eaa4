"""Models of timm: ``timm:NAME``, with a local checkpoint ``NAME@FILE`` or ``NAME@FOLDER``."""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tokenreduce.bench.loaders.loaded import Converted, Loaded, Transform
from tokenreduce.bench.loaders.shared import NETWORK, first_lines, library, seeded, unavailable

__all__ = ["load"]


def load(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    timm = library("timm", "timm")
    importlib.import_module("timm.data")
    pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
    at = "" if source.startswith("hf-hub:") else source.partition("@")[2]
    model_name = source.partition("@")[0] if at else source
    checkpoint: dict[str, Any] = {}
    if at:
        path = Path(at).expanduser()
        if not path.exists():
            raise OSError(f"{name}: there is no checkpoint {path}; give a file, or a folder with config.json")
        if path.is_dir():
            model_name, pretrained = _timm_folder(name, model_name, path), True
        else:
            checkpoint, pretrained = {"checkpoint_path": str(path)}, False
    if ":" not in model_name and not timm.is_model(model_name.partition(".")[0]):
        close = difflib.get_close_matches(model_name.partition(".")[0], timm.list_models(), 3, 0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists them"
        raise ValueError(f"timm has no model {model_name!r}; {hint}")
    try:
        with seeded(seed):
            model = timm.create_model(model_name, pretrained=pretrained, **checkpoint, **options)
    except TypeError as error:
        given = ", ".join(options) or "none"
        raise ValueError(f"{name}: timm does not take these options ({given}): {first_lines(error)}") from error
    except Exception as error:
        if "pretrained tag" in str(error):
            tags = ", ".join(timm.list_pretrained(model_name.partition(".")[0] + ".*")) or "none"
            raise ValueError(f"{name}: {first_lines(error)} Names with weights: {tags}") from error
        raise unavailable(name, error, _fix(model_name, error, bool(checkpoint))) from error
    classes = int(getattr(model, "num_classes", 0))
    subset = timm.data.infer_imagenet_subset(model) if classes else None
    wnids = tuple(timm.data.ImageNetInfo(subset).label_names()) if subset else None
    if wnids is not None and len(wnids) != classes:
        wnids = None
    known = model.pretrained_cfg.get("label_names")
    labels = tuple(known) if known and len(known) == classes else None
    if labels is None and wnids is not None:
        labels = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    transform, size = _timm_transform(timm, model)
    random = not pretrained and not checkpoint
    return Loaded(
        model.eval().to(device), name, "classifier" if classes else "features", transform, size, classes, labels, wnids,
        notes=(f"random weights (seed {seed})",) if random else (),
    )  # fmt: skip


def _fix(model_name: str, error: Exception, checkpoint: bool) -> str:
    """What to do about ``error`` of a model with a ``checkpoint`` given or not."""
    if checkpoint:
        return "give a checkpoint of this architecture; ?num_classes=N when its head has N classes"
    if "No pretrained weights" in str(error):
        return f"timm:{model_name}@FILE, or timm:{model_name}?pretrained=false for random weights"
    return f"{NETWORK}, give a local file (timm:{model_name}@FILE), or ?pretrained=false for random weights"


def _timm_folder(name: str, model_name: str, path: Path) -> str:
    try:
        architecture = json.loads((path / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"{name}: {path} has no config.json with an architecture (timm.models.push_to_hf_hub and "
            "save_for_hf write one); give the weights file itself instead"
        ) from error
    if architecture != model_name.partition(".")[0]:
        raise ValueError(f"{name}: {path} holds {architecture}; write timm:{architecture}@{path}")
    return f"local-dir:{path}"


def _timm_transform(timm: ModuleType, model: Any) -> tuple[Transform, tuple[int, int, int]]:
    """The evaluation transform for the size and channels that the model was really built with."""
    config = timm.data.resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    channels, height, width = config["input_size"]
    if getattr(embed, "img_size", None) is not None:
        height, width = embed.img_size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = channels if first is None or embed is None else first.in_channels
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels; the model takes {channels}")
    size = (int(channels), int(height), int(width))
    config["input_size"] = size
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    inner = timm.data.create_transform(**config, is_training=False)
    return Converted("L" if channels == 1 else "RGB", inner), size
