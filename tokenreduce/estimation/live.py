"""Models that are there already, as an estimate needs them."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.patching import twin

__all__ = ["subject_of_model"]


def subject_of_model(model: nn.Module, ask: Ask) -> Subject:
    """The outermost model of transformers, timm or open_clip in ``model``, by its shapes; it is not changed.

    Models of transformers are made narrow from their config, and so are those of timm that timm makes again by name;
    others run as copies that share their weights. Raises ``ValueError`` where there is none of these, and for models
    without an entry for their family.
    """
    for part in model.modules():
        if _of_transformers(part):
            from tokenreduce.estimation.hf_subjects import of_config

            return of_config(type(part).__name__, _plain(part.config), ask)
        if (size := _image(part)) is not None:
            return _encoder(part, size, ask)
    raise ValueError(f"{type(model).__name__} holds no model of transformers, timm or open_clip whose shapes are known")


def _of_transformers(part: nn.Module) -> bool:
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return base is not None and isinstance(part, base)


def _plain(config: Any) -> Any:
    """A copy without what belongs to weights: quantisation, and attention that runs on a GPU alone."""
    out = copy.deepcopy(config)
    for one in (out, *(c for c in vars(out).values() if hasattr(c, "model_type"))):
        vars(one).pop("quantization_config", None)
        one._attn_implementation = None
    return out


def _image(part: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) that an encoder of timm or open_clip takes, None for another module."""
    home = type(part).__module__.partition(".")[0]
    embed: Any = getattr(part, "patch_embed", None)
    if home == "timm" and getattr(embed, "img_size", None) and hasattr(embed, "proj"):
        return int(embed.proj.in_channels), int(embed.img_size[0]), int(embed.img_size[1])
    if home == "open_clip" and hasattr(part, "conv1") and hasattr(part, "image_size"):
        tower: Any = part
        height, width = tower.image_size if isinstance(tower.image_size, tuple | list) else (tower.image_size,) * 2
        return int(tower.conv1.in_channels), int(height), int(width)
    return None


def _encoder(part: nn.Module, size: tuple[int, int, int], ask: Ask) -> Subject:
    from tokenreduce.estimation.real_subjects import as_it_is

    title = type(part).__name__
    if type(part).__module__.startswith("timm.") and (narrow := _narrow(part, size, ask)) is not None:
        return narrow
    return as_it_is(title, title, twin(part).eval(), size)


def _narrow(part: Any, size: tuple[int, int, int], ask: Ask) -> Subject | None:
    """A narrow model of timm's of this name and depth, None where timm does not make the same again."""
    from tokenreduce.estimation.timm_subjects import from_timm

    name = (getattr(part, "pretrained_cfg", None) or {}).get("architecture") or ""
    options = f"img_size={size[1]}&num_classes={part.num_classes}&depth={len(getattr(part, 'blocks', ()))}"
    if not name or size[1] != size[2]:
        return None
    try:
        found = from_timm(f"timm:{name}", f"{name}?{options}", ask)
    except (ValueError, RuntimeError):
        return None
    return found if found.parameters == sum(p.numel() for p in part.parameters()) else None
