"""The vision tower of a discovered model: which blocks can be looked at."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenreduce.adapters.encoders.hf_attention import implementation
from tokenreduce.adapters.language.families import Vision
from tokenreduce.adapters.language.projector.tower import _feature_block

__all__ = ["attention_in", "has_axes", "stacks_in", "vision_in"]


def vision_in(inner: Any, text: Any) -> Vision | None:
    """What is known of the way from pixels to features: the blocks of the tower, where there are any whose attention
    is seen, and whether videos come as such."""
    videos = hasattr(inner, "get_video_features")
    found = None if text is None else next(stacks_in(inner, text), None)
    if found is None:
        return Vision((), ((),), None, "discovered", False, 0, videos, given=("text",))
    blocks = tuple(found.children())
    packed = any(
        "flash" in implementation(attention_in(b)) or "flex" in implementation(attention_in(b)) for b in blocks
    )
    given = ("text",) if packed else ("tower", "text")
    return Vision((), (blocks,), None, "discovered", False, _feature(inner.config, len(blocks)), videos, given=given)


def stacks_in(inner: Any, text: Any) -> Iterator[nn.ModuleList]:
    """Stacks of blocks with attention outside of the language model, in their order."""
    skip = {id(m) for m in text.modules()}
    for name, module in inner.named_modules():
        if id(module) in skip or not isinstance(module, nn.ModuleList) or not len(module) or "audio" in name:
            continue
        if all(attention_in(block) is not None for block in module):
            yield module


def attention_in(block: Any) -> Any:
    """The attention module of a block that calls the function which its config names; None where none does."""
    for module in block.modules():
        kind = type(module)
        home = sys.modules.get(kind.__module__)
        if hasattr(module, "config") and hasattr(home, "eager_attention_forward") and _calls(kind):
            return module
    return None


def _calls(kind: Any) -> bool:
    known: bool | None = _CALLS.get(kind)
    if known is None:
        try:
            source = inspect.getsource(kind.forward)
        except (OSError, TypeError):
            source = ""
        known = _CALLS[kind] = "eager_attention_forward" in source
    return known


_CALLS: dict[Any, bool] = {}


def _feature(config: Any, depth: int) -> int:
    """The block whose output enters the projector."""
    if not hasattr(config, "vision_feature_layer") and hasattr(config, "vision_feature_layers"):
        last = config.vision_feature_layers[-1]
        return int(max(last % (depth + 1) - 1, 0))
    return _feature_block(config, depth)


def has_axes(inner: Any) -> bool:
    """Whether positions are places in time and image."""
    rope = getattr(inner.config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return hasattr(inner, "compute_3d_position_ids") or any("mrope_section" in p for p in parts)
