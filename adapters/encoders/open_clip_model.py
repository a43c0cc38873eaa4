"""What a patched open_clip tower does around its blocks: the grid of a forward, pooling, dense outputs, resized input.

What leaves a reduced tower:

- pooled features: token pooling is unchanged, average pooling counts every token by its size, attentional poolers get
  log sizes as key bias;
- ``output_tokens=True``: the outputs of an attentional pooler are queries, so their number never changes (all CoCa
  configurations of open_clip). Patch tokens are repeated for every place they stand for once something was merged
  (zero where a token was dropped as well), so that a decoder that cross-attends to them weighs them as the full model
  would; after pruning alone the tokens that are left are returned, as if the others were masked;
- ``forward_intermediates``: every layer on the full grid, zero where a token was dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler
from open_clip.utils import feature_take_indices
from torch import Tensor, nn

from tokenreduce.adapters.encoders.handing import raw_of
from tokenreduce.adapters.encoders.pixels import Pixels
from tokenreduce.adapters.encoders.rebuilding import check_layers_between
from tokenreduce.adapters.encoders.site import may_be_reduced
from tokenreduce.adapters.encoders.state import (
    Entry,
    State,
    collect_states,
    entry_of,
    expand_patches,
    full_plan,
    log_size,
    lost,
    note_entry,
    pool_mean,
    set_state,
    state_of,
)
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.core.compiled import settled
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["PREFIX", "attach_model"]

PREFIX = 1  # the class token; these towers have no registers
_RESIZE = "_tokenreduce_resize"
_METHODS = ("_pool", "_embeds", "forward_intermediates")


class ReducedModel(nn.Module):
    """Mixin of open_clip's ``VisionTransformer``."""

    def _embeds(self, x: Tensor) -> Tensor:
        model: Any = self
        resize = self.__dict__.get(_RESIZE)
        grid = _grid(model, x) if resize is None else settled(resize).grid(_grid(model, x))
        if grid == _grid(model, x):
            out = super()._embeds(x)  # type: ignore[misc]
        else:
            out = _resized(model, x, grid)
        return note_entry(out, Entry(tuple(grid), Pixels(x, tuple(model.patch_size)) if resize is None else None))

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """open_clip's ``_pool`` for reduced tokens (B,K,C): the pooled features and the tokens, see the module's page.

        Raises ``RuntimeError`` for tokens that may be reduced and have lost their sizes.
        """
        model: Any = self
        raw = raw_of(x)
        if raw is not x:  # somebody reads all tokens; pooled features are those of the reduced ones
            features, tokens = model._pool(raw)
            if model.attn_pool is None:
                stock, tokens = super()._pool(x)  # type: ignore[misc]
                features = features if model.pool_type in ("avg", "tok") else stock
            return features, tokens
        state = state_of(x)
        unknown = state is None and entry_of(x) is None and _looks(model)
        if unknown and may_be_reduced(model.transformer.resblocks, x, len(model.positional_embedding)):
            raise lost("pooling")
        if state is None or state.size is None:
            pooled: tuple[Tensor, Tensor] = super()._pool(x)  # type: ignore[misc]
            return pooled
        if model.attn_pool is not None:
            return _pool_by_attention(model, x, state)
        if model.final_ln_after_pool:
            features, tokens = _global_pool(model, x, state)
            return model.ln_post(features), tokens
        return _global_pool(model, model.ln_post(x), state)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """open_clip's ``forward_intermediates`` with every layer's tokens expanded to the full grid (zero where
        dropped).

        With ``resize`` the grid is that of the smaller image. Raises ``ValueError`` for an unknown ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is 'NCHW' or 'NLC', not {output_fmt!r}")
        model: Any = self
        with collect_states() as states:
            output = super().forward_intermediates(  # type: ignore[misc]
                x, indices, stop_early, normalize_intermediates, intermediates_only, "NLC", output_extra_tokens
            )
        # open_clip collects in the order of the layers, whatever the order of the indices.
        layers = sorted(set(feature_take_indices(len(model.transformer.resblocks), indices)[0]))
        check_layers_between(states, layers, normalize_intermediates, not intermediates_only)
        dense = []
        for y, layer in zip(output["image_intermediates"], layers, strict=True):
            y = expand_patches(y, states[layer], PREFIX)
            if output_fmt == "NCHW":
                rows, cols = states[layer].grid or _grid(model, x)
                y = y.reshape(len(y), rows, cols, y.shape[-1]).permute(0, 3, 1, 2).contiguous()
            dense.append(y)
        return {**output, "image_intermediates": dense}


def _looks(model: Any) -> bool:
    """Whether pooling looks at more than the class token, or hands out tokens as they are."""
    return model.attn_pool is not None or model.pool_type != "tok" or model.output_tokens


def _global_pool(model: Any, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
    if model.pool_type not in ("avg", "tok"):
        plan = full_plan(state)
        whole = x if plan is None else plan.expand(x)
        return whole, whole
    tokens = x[:, PREFIX:]
    if model.pool_type == "tok":
        pooled = x[:, 0]
    else:
        assert state.size is not None
        pooled = pool_mean(tokens, state.size[:, PREFIX:])
    return pooled, expand_patches(tokens, state, PREFIX) if model.output_tokens else tokens


def _pool_by_attention(model: Any, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
    contrastive = model.attn_pool_contrastive
    if contrastive is None:
        return model._global_pool(model.ln_post(model.attn_pool(set_state(x, state))))
    x = model.ln_post(x)
    tokens = model.attn_pool(set_state(x, state))
    # In a cascade the second pooler reads the outputs of the first, which stand for one query each.
    return contrastive(tokens) if model.attn_pool_type == "cascade" else contrastive(set_state(x, state)), tokens


class ReducedPooler(nn.Module):
    """Mixin of ``AttentionalPooler``: log sizes of tokens that have a state are a key bias."""

    def forward(self, x: Tensor) -> Tensor:
        state = state_of(x)
        if state is None or state.size is None:
            out: Tensor = super().forward(x)
            return out
        pooler: Any = self
        query = pooler.ln_q(pooler.query).unsqueeze(0).expand(x.shape[0], -1, -1)
        bias = log_size(state, 0, x.dtype)
        x = pooler.ln_k(x)
        return pooler.attn(query, x, x, key_padding_mask=bias, need_weights=False)[0]


# -- resizing the input ------------------------------------------------------------------------------------------------
def _grid(model: Any, image: Tensor) -> tuple[int, int]:
    return image.shape[-2] // model.patch_size[0], image.shape[-1] // model.patch_size[1]


def _resample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,C,H,W) to another size, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bicubic", align_corners=False, antialias=True).to(x.dtype)


def _resized(model: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """open_clip's ``_embeds`` for an image shrunk to ``grid`` patches.

    The position table is interpolated as open_clip's ``resize_pos_embed`` does it; the parameter stays as it is.
    """
    rows, cols = grid
    x = model.conv1(_resample(x, (rows * model.patch_size[0], cols * model.patch_size[1]))).flatten(2).transpose(1, 2)
    head, table = model.positional_embedding[:PREFIX], model.positional_embedding[PREFIX:]
    table = table.reshape(1, *model.grid_size, -1).permute(0, 3, 1, 2)
    table = _resample(table, (rows, cols)).flatten(2).transpose(1, 2).squeeze(0)
    cls = model.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1) + torch.cat([head, table]).to(x.dtype)
    return model.ln_pre(model.patch_dropout(x))


def attach_model(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put :class:`ReducedModel` in front of an open_clip tower's class.

    Raises ``TypeError`` for a pooler that cannot weigh tokens and ``ValueError`` for replaced methods.
    """
    model: Any = tower.module
    for name in ("attn_pool", "attn_pool_contrastive"):
        pooler = getattr(model, name, None)
        if pooler is None:
            continue
        if type(pooler) is not AttentionalPooler:
            raise TypeError(
                f"{tower.family}: {type(pooler).__name__} cannot weigh merged tokens; supported: AttentionalPooler"
            )
        refuse_own(pooler)
        refuse_own(pooler.attn)
        refuse_patched(AttentionalPooler)
        undo.mix_in(pooler, ReducedPooler)
    refuse_own(model, *_METHODS)
    undo.mix_in(model, ReducedModel)
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            undo.set(model, _RESIZE, reducer)
