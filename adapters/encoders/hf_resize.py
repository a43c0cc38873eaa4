"""Methods that act on the input: transformers vision encoders on a smaller image."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.core.compiled import settled
from tokenreduce.core.undo import Undo

__all__ = ["attach_resize", "pair"]


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _target(pixels: Tensor, reducer: Any, patch: tuple[int, int]) -> tuple[int, int]:
    rows, cols = settled(reducer).grid(tuple(s // p for s, p in zip(pixels.shape[-2:], patch, strict=True)))
    return rows * patch[0], cols * patch[1]


def resized_input(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    reducer: Any,
    patch: tuple[int, int],
    flag: bool,
) -> Any:
    """Pre-hook on the embeddings: shrink the image (bicubic, antialiased) to the reducer's share of patches."""
    pixels = args[0]
    size = _target(pixels, reducer, patch)
    if size == tuple(pixels.shape[-2:]):
        return None
    if kwargs.get("bool_masked_pos") is not None:
        raise ValueError("resize changes the number of patches, so bool_masked_pos cannot be used with it")
    return (_shrunk(pixels, size), *args[1:]), {**kwargs, **({"interpolate_pos_encoding": True} if flag else {})}


def resized_tile(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, reducer: Any, patch: tuple[int, int]
) -> Any:
    """Pre-hook on a tower of Idefics3 or SmolVLM, whose positions and masks are made from a mask of patches.

    A patch of the smaller image is there when any part of it is, as in the masks that the models make from pixels.
    """
    pixels, *rest = args
    size = _target(pixels, reducer, patch)
    if size == tuple(pixels.shape[-2:]):
        return None
    mask = rest[0] if rest else kwargs.get("patch_attention_mask")
    if mask is not None:
        shape = (size[0] // patch[0], size[1] // patch[1])
        mask = F.adaptive_max_pool2d(mask.float().unsqueeze(1), shape).squeeze(1).to(mask.dtype)
    return (_shrunk(pixels, size),), {**kwargs, "patch_attention_mask": mask}


def _shrunk(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    # Antialiased resampling has no half precision kernel on the CPU.
    image = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return image.to(pixels.dtype)


def resized_rope(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, reducer: Any, patch: tuple[int, int]
) -> Any:
    """Pre-hook on DINOv3's rotary embedding, which reads only the shape of the pixels."""
    size = _target(args[0], reducer, patch)
    return (args[0][..., :1, :1].expand(*args[0].shape[:2], *size), *args[1:]), kwargs


def attach_resize(tower: Tower, reducer: Any, undo: Undo, *, flag: bool) -> None:
    """Let ``tower`` see images that ``reducer`` makes smaller; ``flag`` says that its embeddings want to be told.

    Raises ``ValueError`` where a model cannot take smaller images.
    """
    module: Any = tower.module
    if isinstance(module, siglip2.Siglip2VisionModel):
        raise ValueError(
            f"{tower.family} cannot be resized here, its processor cuts images into patches: "
            "give the processor a smaller max_num_patches instead"
        )
    if not tower.resizes:
        raise ValueError(
            f"{tower.family} cannot be resized here: the model lays its patches out on the full grid; "
            "give the model smaller images instead"
        )
    patch = pair(module.config.patch_size)
    if isinstance(module, (idefics3.Idefics3VisionTransformer, smolvlm.SmolVLMVisionTransformer)):
        undo.pre_hook(module, functools.partial(resized_tile, reducer=reducer, patch=patch))
        return
    undo.pre_hook(module.embeddings, functools.partial(resized_input, reducer=reducer, patch=patch, flag=flag))
    if hasattr(module, "rope_embeddings"):
        undo.pre_hook(module.rope_embeddings, functools.partial(resized_rope, reducer=reducer, patch=patch))
