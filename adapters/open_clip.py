"""open_clip's own ``VisionTransformer``, alone or inside ``CLIP``, ``CustomTextCLIP`` and ``CoCa``.

Both kinds of block are known: ``ResidualAttentionBlock`` with ``nn.MultiheadAttention`` and
``CustomResidualAttentionBlock`` with open_clip's ``Attention`` (qk-norm, head scale, inner norm, ``scale_attn``,
``scale_fc``). Keys and queries are those after qk-norm. Text towers and decoders are made of the same blocks and are
left alone. A timm tower inside open_clip (``TimmModel.trunk``) belongs to the timm adapter.

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

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from open_clip.utils import feature_take_indices
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from tokenreduce.adapters.encoder import (
    Attended,
    Reduced,
    State,
    Tower,
    attach_tower,
    collect_states,
    expand_patches,
    full_plan,
    log_size,
    pool_mean,
    state_of,
)
from tokenreduce.compiled import settled
from tokenreduce.patching import Undo
from tokenreduce.reducer import Reducer

__all__ = ["attach", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")
PREFIX = 1  # the class token; these towers have no registers

Heads = tuple[Tensor, Tensor, Tensor]


# -- attention -------------------------------------------------------------------------------------------------------
def _split(attn: Any, x: Tensor) -> Heads:
    """Queries, keys and values (B,H,N,d) of one packed projection, before qk-norm."""
    b, n, _ = x.shape
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    shape = (b, n, attn.num_heads, -1)
    return q.reshape(shape).transpose(1, 2), k.reshape(shape).transpose(1, 2), v.reshape(shape).transpose(1, 2)


def _values(attn: Any, x: Tensor) -> Tensor:
    """Values (B,H,N,d) alone."""
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
    v = F.linear(x, attn.in_proj_weight.chunk(3)[2], bias)
    return v.reshape(x.shape[0], x.shape[1], attn.num_heads, -1).transpose(1, 2)


def _join(attn: Any, heads: Tensor) -> Tensor:
    """Heads (B,H,N,d) of an ``nn.MultiheadAttention`` to its output (B,N,C)."""
    b, h, n, d = heads.shape
    return F.linear(heads.transpose(1, 2).reshape(b, n, h * d), attn.out_proj.weight, attn.out_proj.bias)


def _dropout(attn: Any) -> float:
    return attn.dropout if attn.training else 0.0


def _takes_kernel(attn: Any, x: Tensor) -> bool:
    """Whether ``nn.MultiheadAttention`` would answer self-attention on ``x`` with its inference kernel."""
    if attn.training or attn.num_heads % 2 or attn.in_proj_bias is None or x.device.type not in ("cpu", "cuda"):
        return False
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return False
    tensors = (x, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
    if torch.overrides.has_torch_function(tensors) or x.dtype != attn.in_proj_weight.dtype:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _exactly(attn: Any, x: Tensor, queries: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B,N,C), queries, keys and values of self-attention, bit-identical to ``nn.MultiheadAttention``.

    The module sums in one of three orders. Without its inference kernel it projects sequence-first and uses the fused
    attention. On CUDA the kernel projects batch-first and uses the fused attention too. Elsewhere the kernel writes
    the map out with scaled queries; doing the same costs what the stock model costs. ``queries`` says that they are
    wanted, unscaled, there.
    """
    b, n, c = x.shape
    h, weight, bias = attn.num_heads, attn.in_proj_weight, attn.in_proj_bias
    if not _takes_kernel(attn, x):
        packed = F.linear(x.transpose(0, 1), weight, bias).unflatten(-1, (3, c))
        packed = packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        q, k, v = (t.view(n, b * h, -1).transpose(0, 1).view(b, h, n, -1) for t in packed)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=_dropout(attn))
        out = F.linear(out.permute(2, 0, 1, 3).reshape(b * n, c), attn.out_proj.weight, attn.out_proj.bias)
        return out.view(n, b, c).transpose(0, 1), q, k, v
    if torch.is_autocast_enabled(x.device.type):  # on CPU, where the kernel casts its arguments by itself
        return attn(x, x, x, need_weights=False)[0], *_split(attn, x)
    if x.is_cuda and (c // h) % 8 == 0:
        like = x.view(b, n, h, -1).transpose(1, 2)
        if torch._fused_sdp_choice(like, like, like) != SDPBackend.MATH.value:
            q, k, v = _split(attn, x)
            return _join(attn, F.scaled_dot_product_attention(q, k, v)), q, k, v
    q, k, v = torch._transform_bias_rescale_qkv(x @ weight.t(), bias, h)
    attention = torch.bmm(q.view(b * h, n, -1), k.view(b * h, n, -1).transpose(1, 2))
    attention = torch.softmax(attention, -1, out=attention)
    out = torch.bmm(attention, v.view(b * h, n, -1)).view(b, h, n, -1)
    out = F.linear(out.transpose(1, 2).reshape(b * n, c), attn.out_proj.weight, attn.out_proj.bias).view(b, n, c)
    return out, q * math.sqrt(c // h) if queries else q, k, v


# -- blocks ----------------------------------------------------------------------------------------------------------
def _alone(*others: Tensor | None) -> None:
    if any(other is not None for other in others):
        raise ValueError("a patched block takes one input and no attn_mask: token counts change; call tr.unpatch first")


class _ClipBlock(Reduced):
    """What both kinds of block share."""

    attn: Any

    def _normed(self, x: Tensor) -> Tensor:
        return self.ln_1(x)  # type: ignore[attr-defined]

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.ls_1(out)  # type: ignore[attr-defined]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ls_2(self.mlp(self.ln_2(x)))  # type: ignore[attr-defined]


class ReducedAttentionBlock(_ClipBlock, ResidualAttentionBlock):
    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        _alone(k_x, v_x, attn_mask)
        return self._run(q_x)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        y = self._normed(x)
        if bias is None and not any(need != "before" for need in needs):
            return Attended(self.attention(y))
        if bias is None and not torch.compiler.is_compiling():
            return Attended(*_exactly(self.attn, y, "queries" in needs or "attention" in needs))
        q, k, v = _split(self.attn, y)
        bias = None if bias is None else bias.to(q.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=_dropout(self.attn))
        return Attended(_join(self.attn, heads), q, k, v)

    def _project(self, x: Tensor, context: Any) -> Attended:
        return Attended(x, *_split(self.attn, self._normed(x)))

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        v = _values(self.attn, self._normed(x))
        attention = F.dropout(attention.to(v.dtype), self.attn.dropout, self.attn.training)
        return Attended(_join(self.attn, attention @ v), values=v)


class ReducedCustomAttentionBlock(_ClipBlock, CustomResidualAttentionBlock):
    def forward(self, x: Tensor, *others: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        # open_clip's checkpointing passes the arguments of the other kind of block to this one, too.
        _alone(*others, attn_mask)
        return self._run(x)

    def _normalised(self, x: Tensor) -> Heads:
        q, k, v = _split(self.attn, self._normed(x))
        return self.attn.ln_q(q), self.attn.ln_k(k), v

    def _close(self, x: Tensor, heads: Tensor) -> Tensor:
        attn = self.attn
        if attn.head_scale is not None:
            heads = heads * attn.head_scale
        out = attn.ln_inner(heads.transpose(1, 2).reshape(x.shape))
        return self.ln_attn(attn.out_drop(attn.out_proj(out)))

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        q, k, v = self._normalised(x)
        bias = None if bias is None else bias.to(q.dtype)
        p = self.attn.attn_drop.p if self.attn.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        return Attended(self._close(x, heads), q, k, v)

    def _project(self, x: Tensor, context: Any) -> Attended:
        return Attended(x, *self._normalised(x))

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        v = _values(self.attn, self._normed(x))
        heads = self.attn.attn_drop(attention.to(v.dtype)) @ v
        return Attended(self._close(x, heads), values=v)


BLOCKS: dict[type, type] = {
    ResidualAttentionBlock: ReducedAttentionBlock,
    CustomResidualAttentionBlock: ReducedCustomAttentionBlock,
}
ATTENTIONS: dict[type, type] = {
    ResidualAttentionBlock: nn.MultiheadAttention,
    CustomResidualAttentionBlock: Attention,
}


# -- pooling and dense outputs -----------------------------------------------------------------------------------------
def pool(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's ``_pool`` for reduced tokens (B,K,C): the pooled features and the tokens, see the module's page."""
    state = state_of(x)
    if state is None or state.size is None:
        return type(model)._pool(model, x)
    if model.attn_pool is not None:
        return _pool_by_attention(model, x, state)
    if model.final_ln_after_pool:
        pooled, tokens = _global_pool(model, x, state)
        return model.ln_post(pooled), tokens
    return _global_pool(model, model.ln_post(x), state)


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
        return model._global_pool(model.ln_post(_queried(model.attn_pool, x, state)))
    x = model.ln_post(x)
    tokens = _queried(model.attn_pool, x, state)
    # In a cascade the second pooler reads the outputs of the first, which stand for one query each.
    return contrastive(tokens) if model.attn_pool_type == "cascade" else _queried(contrastive, x, state), tokens


def _queried(pooler: Any, x: Tensor, state: State) -> Tensor:
    """The forward of ``AttentionalPooler`` with log sizes as key bias; (B,K,C) to (B,queries,output_dim)."""
    query = pooler.ln_q(pooler.query).unsqueeze(0).expand(x.shape[0], -1, -1)
    bias = log_size(state, 0, x.dtype)
    x = pooler.ln_k(x)
    return pooler.attn(query, x, x, key_padding_mask=bias, need_weights=False)[0]


def forward_intermediates(
    model: Any,
    x: Tensor,
    indices: Any = None,
    stop_early: bool = False,
    normalize_intermediates: bool = False,
    intermediates_only: bool = False,
    output_fmt: str = "NCHW",
    output_extra_tokens: bool = False,
    *,
    resize: Any = None,
) -> dict[str, Any]:
    """open_clip's ``forward_intermediates`` with every layer's tokens expanded to the full grid (zero where dropped).

    With a ``resize`` reducer the grid is that of the smaller image. Raises ``ValueError`` for an unknown
    ``output_fmt``.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is 'NCHW' or 'NLC', not {output_fmt!r}")
    with collect_states() as states:
        output = type(model).forward_intermediates(
            model, x, indices, stop_early, normalize_intermediates, intermediates_only, "NLC", output_extra_tokens
        )
    rows, cols = _grid(model, x) if resize is None else resize.grid(_grid(model, x))
    # open_clip collects in the order of the layers, whatever the order of the indices.
    layers = sorted(set(feature_take_indices(len(model.transformer.resblocks), indices)[0]))
    dense = [
        expand_patches(y, states[layer], PREFIX) for y, layer in zip(output["image_intermediates"], layers, strict=True)
    ]
    if output_fmt == "NCHW":
        dense = [y.reshape(len(y), rows, cols, -1).permute(0, 3, 1, 2).contiguous() for y in dense]
    return {**output, "image_intermediates": dense}


# -- resizing the input ------------------------------------------------------------------------------------------------
def _grid(model: Any, image: Tensor) -> tuple[int, int]:
    return image.shape[-2] // model.patch_size[0], image.shape[-1] // model.patch_size[1]


def _resample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,C,H,W) to another size, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bicubic", align_corners=False, antialias=True).to(x.dtype)


def resized_embeds(model: Any, x: Tensor, *, reducer: Any) -> Tensor:
    """open_clip's ``_embeds`` for an image shrunk to the reducer's share of patches.

    The position table is interpolated as open_clip's ``resize_pos_embed`` does it; the parameter stays as it is.
    """
    grid = _grid(model, x)
    rows, cols = settled(reducer).grid(grid)
    if (rows, cols) == grid:
        return type(model)._embeds(model, x)
    x = model.conv1(_resample(x, (rows * model.patch_size[0], cols * model.patch_size[1]))).flatten(2).transpose(1, 2)
    head, table = model.positional_embedding[:PREFIX], model.positional_embedding[PREFIX:]
    table = table.reshape(1, *model.grid_size, -1).permute(0, 3, 1, 2)
    table = _resample(table, (rows, cols)).flatten(2).transpose(1, 2).squeeze(0)
    cls = model.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1) + torch.cat([head, table]).to(x.dtype)
    return model.ln_pre(model.patch_dropout(x))


# -- finding and attaching ------------------------------------------------------------------------------------------
def towers(model: nn.Module) -> Iterator[Tower]:
    """open_clip's own vision towers inside ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            blocks = tuple(module.transformer.resblocks)
            yield Tower(
                name, module, "open_clip VisionTransformer", blocks, BLOCKS, PREFIX, True, module.grid_size, EVIDENCE
            )


def _check(tower: Tower) -> None:
    model: Any = tower.module
    pairs: list[tuple[Any, type]] = [(b.attn, ATTENTIONS[type(b)]) for b in tower.blocks if type(b) in ATTENTIONS]
    if not all(getattr(part, "batch_first", True) for part in (model.transformer, *(attn for attn, _ in pairs))):
        raise TypeError(
            f"{tower.family}: a sequence-first transformer loses the token sizes when it transposes; "
            "build it with batch_first=True"
        )
    for found, kind in pairs:
        attn: Any = found
        if type(found) is not kind:  # a subclass may compute something else
            raise TypeError(
                f"{tower.family}: attention class {type(attn).__name__} is not supported; supported: {kind.__name__}"
            )
        if getattr(attn, "logit_scale", None) is not None:
            raise TypeError(
                f"{tower.family}: scaled cosine attention (scaled_cosine_attn=True) is not supported, open_clip cannot "
                "run it either; build the tower without it (qk_norm=True is supported)"
            )
        if kind is nn.MultiheadAttention and (
            attn.bias_k is not None or attn.add_zero_attn or attn.in_proj_weight is None
        ):
            raise TypeError(
                f"{tower.family}: MultiheadAttention with add_bias_kv, add_zero_attn, kdim or vdim is not supported; "
                "supported is plain self-attention"
            )
    for name in ("attn_pool", "attn_pool_contrastive"):
        pooler = getattr(model, name, None)
        if pooler is not None and type(pooler) is not AttentionalPooler:
            raise TypeError(
                f"{tower.family}: {type(pooler).__name__} cannot weigh merged tokens; supported: AttentionalPooler"
            )


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into an open_clip tower.

    Raises ``TypeError`` for scaled cosine attention, sequence-first transformers, and block, attention or pooler
    classes that are not known.
    """
    model: Any = tower.module
    _check(tower)
    attach_tower(tower, reducers, undo)
    resize = next((r for r in reducers if r.site() == "input"), None)
    undo.set(model, "_pool", functools.partial(pool, model))
    undo.set(model, "forward_intermediates", functools.partial(forward_intermediates, model, resize=resize))
    if resize is not None:
        undo.set(model, "_embeds", functools.partial(resized_embeds, model, reducer=resize))
