"""What a patched timm model does around its blocks: the grid of a forward, pooling, dense outputs, resized input."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokenreduce.adapters.encoders.handing import raw_of
from tokenreduce.adapters.encoders.pixels import Pixels
from tokenreduce.adapters.encoders.rebuilding import check_layers_between
from tokenreduce.adapters.encoders.site import may_be_reduced
from tokenreduce.adapters.encoders.state import (
    Entry,
    carry_state,
    collect_states,
    entry_of,
    expand_patches,
    log_size,
    lost,
    note_entry,
    pool_mean,
    state_of,
)
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.core.compiled import settled
from tokenreduce.core.undo import Undo

__all__ = ["attach_model", "attach_resize"]

#: Poolings that look at all tokens.
_OVER_ALL = ("avg", "avgmax", "max")
_METHODS = ("pool", "forward_intermediates", "_pos_embed")


class ReducedModel(nn.Module):
    """Mixin of timm's ``VisionTransformer`` and ``Eva``."""

    def _pos_embed(self, x: Tensor) -> Any:
        if not x.shape[0] and x.dim() == 4:  # timm flattens these with a -1, which no tensor without elements takes
            out = super()._pos_embed(x.new_zeros(1, *x.shape[1:]))  # type: ignore[misc]
            out = (out[0][:0], *out[1:]) if isinstance(out, tuple) else out[:0]
        else:
            out = super()._pos_embed(x)  # type: ignore[misc]
        entry = entry_of(x)
        if entry is None and x.dim() == 4:
            entry = Entry((x.shape[1], x.shape[2]))
        note_entry(out[0] if isinstance(out, tuple) else out, entry or Entry())
        return out

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's ``pool`` for reduced tokens: means count every token by its size, attention pooling gets log sizes.

        Raises ``RuntimeError`` for tokens that may be reduced and have lost their sizes.
        """
        model: Any = self
        kind = model.global_pool if pool_type is None else pool_type
        given, x = x, raw_of(x)
        if model.attn_pool is None and kind not in _OVER_ALL:
            return super().pool(given, pool_type)  # type: ignore[misc]
        state = state_of(x)
        if state is None and entry_of(x) is None and may_be_reduced(model.blocks, x, _stock(model)):
            raise lost(f"global_pool={'map' if model.attn_pool is not None else kind!r}")
        if state is None or state.size is None:
            return super().pool(x, pool_type)  # type: ignore[misc]
        p = model.num_prefix_tokens
        if model.attn_pool is not None:
            skip = 0 if getattr(model, "pool_include_prefix", True) else p
            refuse_own(model.attn_pool)
            return model.attn_pool(x[:, skip:], attn_mask=log_size(state, skip, x.dtype)[:, None, None, :])
        skip = 0 if getattr(model, "pool_include_prefix", False) else p
        x, size = x[:, skip:], state.size[:, skip:]
        present = x if state.valid is None else x.masked_fill(~state.valid[:, skip:, None], float("-inf"))
        if kind == "max":
            return present.amax(dim=1)
        mean = pool_mean(x, size)
        return mean if kind == "avg" else 0.5 * (present.amax(dim=1) + mean)

    def forward_intermediates(self, x: Tensor, indices: Any = None, *args: Any, **settings: Any) -> Any:
        """timm's ``forward_intermediates`` with every layer's tokens expanded to the full grid (zero where dropped)."""
        model: Any = self
        wanted, args, settings = _as_tokens(args, settings)
        with collect_states() as states:
            got = super().forward_intermediates(x, indices, *args, **settings)  # type: ignore[misc]
        # timm returns the layers in ascending order, whatever order they were asked for.
        layers = sorted(set(feature_take_indices(len(model.blocks), indices)[0]))

        normed = settings.get("norm", args[1] if len(args) > 1 else False)
        check_layers_between(states, layers, bool(normed), not isinstance(got, list))

        def dense(y: Tensor, layer: int) -> Tensor:
            y = expand_patches(y, states[layer], model.num_prefix_tokens)
            if wanted == "NLC":
                return y
            rows, cols = states[layer].grid or model.patch_embed.dynamic_feat_size(x.shape[-2:])
            return y.reshape(y.shape[0], rows, cols, y.shape[-1]).permute(0, 3, 1, 2).contiguous()

        def each(items: list[Any]) -> list[Any]:
            pairs = zip(items, layers, strict=True)
            return [(dense(y[0], i), y[1]) if isinstance(y, tuple) else dense(y, i) for y, i in pairs]

        if isinstance(got, dict):
            return {**got, "image_intermediates": each(got["image_intermediates"])}
        return each(got) if isinstance(got, list) else (got[0], each(got[1]))


#: Where ``output_fmt`` is among the positional arguments behind ``indices``.
_FORMAT_AT = 3


def _as_tokens(args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The ``output_fmt`` that was asked for, and the arguments with "NLC" in its place."""
    if len(args) > _FORMAT_AT:
        return args[_FORMAT_AT], (*args[:_FORMAT_AT], "NLC", *args[_FORMAT_AT + 1 :]), settings
    return settings.get("output_fmt", "NCHW"), args, {**settings, "output_fmt": "NLC"}


def _stock(model: Any) -> int | None:
    """Tokens of every forward of ``model`` at its entry; None where it takes images of several sizes."""
    embed = model.patch_embed
    if model.dynamic_img_size or not getattr(embed, "strict_img_size", False):
        return None
    return int(model.num_prefix_tokens + embed.grid_size[0] * embed.grid_size[1])


def note_grid(embed: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook on a patch embedding: the grid of this image goes with its patches."""
    if isinstance(output, Tensor):
        size = tuple(args[0].shape[-2:])
        if hasattr(embed, "dynamic_feat_size"):
            note_entry(output, Entry(tuple(embed.dynamic_feat_size(size)), Pixels(args[0], tuple(embed.patch_size))))
        elif size == tuple(embed.img_size):
            note_entry(output, Entry(tuple(embed.grid_size), Pixels(args[0], tuple(embed.patch_size))))


def attach_model(model: Any, family: str, undo: Undo) -> None:
    """Put :class:`ReducedModel` in front of a timm model's class.

    Raises ``TypeError`` for an attention pooling that cannot weigh tokens and ``ValueError`` for replaced methods.
    """
    pooling = getattr(model, "attn_pool", None)
    if pooling is not None:
        if type(pooling).__name__ != "AttentionPoolLatent":
            raise TypeError(f"{family}: {type(pooling).__name__} cannot weigh merged tokens; AttentionPoolLatent can")
        refuse_own(pooling)
        refuse_patched(type(pooling))
    refuse_own(model, *_METHODS)
    undo.mix_in(model, ReducedModel)
    undo.hook(model.patch_embed, note_grid)
    for norm in (getattr(model, "norm_pre", None), getattr(model, "norm", None)):
        if norm is not None:
            undo.hook(norm, carry_state)


# -- resizing the input ------------------------------------------------------------------------------------------------
def resized_input(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, reducer: Any) -> Any:
    """Forward pre-hook on the patch embedding: shrink the image to the reducer's share of patches."""
    grid = tuple(s // p for s, p in zip(args[0].shape[-2:], model.patch_size, strict=True))
    rows, cols = settled(reducer).grid(grid)
    size = (rows * model.patch_size[0], cols * model.patch_size[1])
    if size == tuple(args[0].shape[-2:]):
        return None
    # Antialiased resampling has no half precision kernel on the CPU.
    wide = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
    image = F.interpolate(wide, size=size, mode="bicubic", align_corners=False, antialias=True)
    return (image.to(args[0].dtype), *args[1:]), kwargs


def attach_resize(model: Any, reducer: Any, undo: Undo) -> None:
    """Let ``model`` see images that ``reducer`` makes smaller. Raises ``ValueError`` where it cannot take them."""
    embed = model.patch_embed
    if not hasattr(embed, "strict_img_size") or getattr(model, "pos_embed_mode", None) is not None:
        raise ValueError(f"resize needs a patch embedding with dynamic image size, not {type(embed).__name__}")
    if not model.dynamic_img_size:
        undo.set(model, "dynamic_img_size", True)
        undo.set(embed, "strict_img_size", False)
        undo.set(embed, "flatten", False)
        undo.set(embed, "output_fmt", type(embed.output_fmt)("NHWC"))
        rope = getattr(model, "rope", None)
        if getattr(rope, "_use_cached_embed", False):  # a table for the model's own image size only
            undo.set(rope, "_use_cached_embed", False)  # type: ignore[arg-type]
    undo.pre_hook(embed, functools.partial(resized_input, reducer=reducer))
