"""The vision tower of a discovered model: which blocks can be looked at."""

from __future__ import annotations

from typing import Any

from tokenreduce.adapters.language.families import Vision

__all__ = ["vision_in"]


def vision_in(inner: Any, text: Any) -> Vision | None:
    """What is known of the way from pixels to features."""
    films = hasattr(inner, "get_video_features")
    return Vision((), ((),), None, "discovered", False, -1, films, given=("text",))
