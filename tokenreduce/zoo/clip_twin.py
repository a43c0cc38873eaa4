"""One set of encoder weights as a timm ``VisionTransformer`` and as a transformers ``CLIPVisionModel``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["clip_state", "timm_state"]

_OUTSIDE = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "norm_pre.weight": "pre_layrnorm.weight",
    "norm_pre.bias": "pre_layrnorm.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))


def clip_state(timm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a ``CLIPVisionModel`` from that of a timm model with ``pre_norm``, without its ``head``."""
    state = {theirs: timm[ours] for ours, theirs in _OUTSIDE.items()}
    state["embeddings.class_embedding"] = timm["cls_token"][0, 0]
    state["embeddings.position_embedding.weight"] = timm["pos_embed"][0]
    for i in range(_depth(timm, "blocks.")):
        ours, theirs = f"blocks.{i}.", f"encoder.layers.{i}."
        for end in ("weight", "bias"):
            for a, b in _INSIDE.items():
                state[f"{theirs}{b}.{end}"] = timm[f"{ours}{a}.{end}"]
            for name, part in zip("qkv", timm[f"{ours}attn.qkv.{end}"].chunk(3), strict=True):
                state[f"{theirs}self_attn.{name}_proj.{end}"] = part
    return {k: v.detach().clone() for k, v in state.items()}


def timm_state(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: state of the timm model without ``head``."""
    state = {ours: clip[theirs] for ours, theirs in _OUTSIDE.items()}
    state["cls_token"] = clip["embeddings.class_embedding"][None, None]
    state["pos_embed"] = clip["embeddings.position_embedding.weight"][None]
    for i in range(_depth(clip, "encoder.layers.")):
        ours, theirs = f"blocks.{i}.", f"encoder.layers.{i}."
        for end in ("weight", "bias"):
            for a, b in _INSIDE.items():
                state[f"{ours}{a}.{end}"] = clip[f"{theirs}{b}.{end}"]
            parts = [clip[f"{theirs}self_attn.{n}_proj.{end}"] for n in "qkv"]
            state[f"{ours}attn.qkv.{end}"] = torch.cat(parts)
    return {k: v.detach().clone() for k, v in state.items()}
