"""Configs of transformers with the same layers and heads of few numbers."""

from __future__ import annotations

import copy
from typing import Any

from tokenreduce.estimation.scale import Heads

__all__ = ["heads_of", "narrowed", "vision_heads"]

#: (heads, width of a head, width of the MLP): numbers that no other dimension is likely to have.
TEXT, VISION = (3, 10, 34), (3, 12, 44)
#: Frequencies of time, rows and columns where a config does not say.
MROPE = {"qwen2_vl": [16, 24, 24], "qwen2_5_vl": [16, 24, 24], "qwen3_vl": [24, 20, 20]}


def narrowed(config: Any) -> Any:
    """A copy of ``config``, of an image language model or of an encoder, whose widths are small."""
    out = copy.deepcopy(config)
    text, vision = getattr(out, "text_config", None), getattr(out, "vision_config", None)
    if text is None or vision is None:
        _vision(out, None)
        return out
    _text(text)
    width = text.hidden_size
    _vision(vision, width)
    for key in ("projection_dim", "hidden_size"):  # PaliGemma's, between tower and language model
        if key in vars(out):
            setattr(out, key, width)
    return out


def _text(config: Any) -> None:
    heads, width, mlp = TEXT
    given = heads_of(config)
    config.hidden_size, config.intermediate_size = heads * width, mlp
    config.num_attention_heads = heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = heads if given.keys == given.queries else 1
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = width
    usual = next((s for kind, s in MROPE.items() if str(config.model_type).startswith(kind)), None)
    for rope in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(rope, dict) and (rope.get("mrope_section") or usual):
            rope["mrope_section"] = _sections(rope.get("mrope_section") or usual or [], width // 2)


def _sections(given: list[int], total: int) -> list[int]:
    """``given`` in the same proportions, with another sum; none is empty."""
    out = [max(1, round(s * total / sum(given))) for s in given]
    out[out.index(max(out))] += total - sum(out)
    return out


def _vision(config: Any, text: int | None) -> None:
    heads, width, mlp = VISION
    if "embed_dim" in vars(config):  # Qwen2-VL calls the width of its output hidden_size
        config.embed_dim = heads * width
        if text is not None:
            config.hidden_size = text
    else:
        config.hidden_size = heads * width
    for key in ("num_attention_heads", "num_heads"):
        if hasattr(config, key):
            setattr(config, key, heads)
    if "intermediate_size" in vars(config):
        config.intermediate_size = mlp
    if text is not None:
        for key in ("out_hidden_size", "projection_dim"):
            if key in vars(config):
                setattr(config, key, text)


def heads_of(config: Any) -> Heads:
    """Heads of a language model."""
    heads = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    return Heads(heads, keys, int(getattr(config, "head_dim", None) or config.hidden_size // heads))


def vision_heads(config: Any) -> Heads:
    """Heads of a vision transformer."""
    heads = int(getattr(config, "num_attention_heads", None) or config.num_heads)
    width = config.embed_dim if "embed_dim" in vars(config) else config.hidden_size
    return Heads(heads, heads, int(width) // heads)
