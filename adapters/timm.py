"""timm ``VisionTransformer`` and ``Eva`` (EVA02, DINOv3, RoPE ViTs).

Attention halves are written out (qkv, norms, rotary embedding, fused attention, norm, gate, projection) because timm
passes no extra arguments through its attention modules. Keys are those after qk-norm and before RoPE.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models._features import feature_take_indices
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from tokenreduce.adapters.encoder import (
    Attended,
    Reduced,
    State,
    Tower,
    attach_tower,
    carry_state,
    collect_states,
    expand_patches,
    log_size,
    pool_mean,
    state_of,
)
from tokenreduce.compiled import settled
from tokenreduce.patching import Undo
from tokenreduce.reducer import Reducer

__all__ = ["attach", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")


# -- attention -------------------------------------------------------------------------------------------------------
def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (after qk-norm, before RoPE) and values, (B,H,N,d); kv heads as they are."""
    b, n, _ = x.shape
    if getattr(attn, "qkv", None) is not None:
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, weight=attn.qkv.weight, bias=bias)
        q, k, v = qkv.reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        q = attn.q_proj(x).reshape(b, n, attn.num_heads, -1).transpose(1, 2)
        k = attn.k_proj(x).reshape(b, n, kv_heads, -1).transpose(1, 2)
        v = attn.v_proj(x).reshape(b, n, kv_heads, -1).transpose(1, 2)
    return attn.q_norm(q), attn.k_norm(k), v


def _rotate(attn: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    p, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

    def turn(t: Tensor) -> Tensor:
        return torch.cat([t[:, :, :p], apply_rot_embed_cat(t[:, :, p:], rope, half=half)], dim=2).type_as(v)

    return turn(q), turn(k)


def _grouped(attn: Any, t: Tensor) -> Tensor:
    groups = getattr(attn, "num_kv_groups", 1)
    return t.repeat_interleave(groups, dim=1) if groups > 1 else t


def _scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attn: Any) -> Tensor:
    """Attention output (B,H,N,d), fused where the stock module is, in the stock module's order of operations."""
    if attn.fused_attn:
        p = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return attn.attn_drop(logits.softmax(dim=-1)) @ v


def _close(attn: Any, heads: Tensor, x: Tensor) -> Tensor:
    """Heads (B,H,N,d) to the attention module's output (B,N,C)."""
    gate = attn.gate(x).sigmoid() if getattr(attn, "gate", None) is not None else None
    out = heads.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
    out = attn.norm(out)
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out))


def _attend(attn: Any, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Attended:
    q, k, v = _qkv(attn, x)
    rotated = None if rope is None else _rotate(attn, q, k, v, rope)
    used_q, used_k = (q, k) if rotated is None else rotated
    heads = _scores(used_q, _grouped(attn, used_k), _grouped(attn, v), bias, attn)
    seen = None if rotated is None else (used_q, _grouped(attn, used_k))
    return Attended(_close(attn, heads, x), q, _grouped(attn, k), _grouped(attn, v), seen)


def _project(attn: Any, x: Tensor, rope: Tensor | None) -> Attended:
    q, k, v = _qkv(attn, x)
    rotated = None if rope is None else _rotate(attn, q, k, v, rope)
    seen = None if rotated is None else (rotated[0], _grouped(attn, rotated[1]))
    return Attended(x, q, _grouped(attn, k), _grouped(attn, v), seen)


def _attend_with(attn: Any, x: Tensor, attention: Tensor) -> Attended:
    v = _grouped(attn, _qkv(attn, x)[2])
    return Attended(_close(attn, attn.attn_drop(attention) @ v, x), values=v)


def _rope_rows(rope: Tensor | None, state: State, prefix: int) -> Tensor | None:
    """Rows of the rotary table for the tokens that are left: each stands at its representative's place."""
    if rope is None or state.origin is None:
        return rope
    rows = state.origin[:, prefix:] - prefix  # (B,K)
    if rope.dim() == 2:  # (N,D)
        return rope[rows].unsqueeze(1)
    if rope.dim() == 3:  # (H,N,D), one table per head (mixed RoPE)
        return rope[:, rows].transpose(0, 1)
    index = rows[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])  # (B,1 or H,N,D)
    return rope.gather(2, index)


# -- blocks ----------------------------------------------------------------------------------------------------------
class _TimmBlock(Reduced):
    """Blocks with one attention module ``attn`` and a forward of ``(x, attn_mask, is_causal)``."""

    attn: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _no_mask(attn_mask, is_causal)
        return self._run(x)

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm1(x)  # type: ignore[attr-defined]

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        return _attend(self.attn, self._normed(x), bias, context)

    def _project(self, x: Tensor, context: Any) -> Attended:
        return _project(self.attn, self._normed(x), context)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        return _attend_with(self.attn, self._normed(x), attention)


def _no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a patched model takes no attn_mask or is_causal: token counts change; call tr.unpatch first")


class ReducedBlock(_TimmBlock, Block):
    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedResPostBlock(_TimmBlock, ResPostBlock):
    def _normed(self, x: Tensor) -> Tensor:
        return x

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducedEvaBlock(_TimmBlock, EvaBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _no_mask(attn_mask, is_causal)
        return self._run(x, rope)

    def _context(self, context: Any, state: State) -> Any:
        return _rope_rows(context, state, self.attn.num_prefix_tokens)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ReducedParallelScalingBlock(_TimmBlock, ParallelScalingBlock):
    """Attention and MLP share one projection, so nothing can happen between them: both see N tokens, the plan is
    applied to their common output."""

    _one_branch = True

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        mlp, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        mlp = mlp if self.mlp_bias is None else mlp + self.mlp_bias
        shape = (b, n, self.num_heads, self.head_dim)
        q, k = self.q_norm(q.view(shape)).transpose(1, 2), self.k_norm(k.view(shape)).transpose(1, 2)
        return mlp, q, k, v.view(shape).transpose(1, 2)

    def _join(self, x: Tensor, heads: Tensor, mlp: Tensor) -> Tensor:
        out = heads.transpose(1, 2).reshape(x.shape)
        mlp = self.mlp_drop(self.mlp_act(mlp))
        if self.out_proj is not None:
            return self.out_proj(torch.cat((out, mlp), dim=-1))
        return self.attn_out_proj(out) + self.mlp_out_proj(mlp)  # type: ignore[misc]

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        mlp, q, k, v = self._split(x)
        return Attended(self._join(x, _scores(q, k, v, bias, self), mlp), q, k, v)

    def _project(self, x: Tensor, context: Any) -> Attended:
        _, q, k, v = self._split(x)
        return Attended(x, q, k, v)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        mlp, _, _, v = self._split(x)
        return Attended(self._join(x, self.attn_drop(attention) @ v, mlp), values=v)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x


class ReducedParallelThingsBlock(_TimmBlock, ParallelThingsBlock):
    """Several attentions, then several MLPs: the plan stands between the two sums. Methods see the heads of all
    attentions side by side, so that means over heads are means over all of them."""

    def _branches(self, x: Tensor, one: Any) -> list[Attended]:
        return [one(branch.attn, branch.norm(x)) for branch in self.attns]  # type: ignore[operator]

    def _stacked(self, got: list[Attended], out: Tensor) -> Attended:
        def heads(name: str) -> Tensor | None:
            parts = [getattr(g, name) for g in got]
            return None if parts[0] is None else torch.cat(parts, 1)

        return Attended(out, heads("queries"), heads("keys"), heads("values"))

    def _summed(self, got: list[Attended]) -> Tensor:
        pairs = zip(self.attns, got, strict=True)
        return torch.stack([branch.drop_path(branch.ls(g.out)) for branch, g in pairs]).sum(dim=0)  # type: ignore[operator]

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        got = self._branches(x, lambda attn, y: _attend(attn, y, bias, None))
        return self._stacked(got, self._summed(got))

    def _project(self, x: Tensor, context: Any) -> Attended:
        return self._stacked(self._branches(x, lambda attn, y: _project(attn, y, None)), x)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        maps = iter(attention.chunk(len(self.attns), dim=1))
        got = self._branches(x, lambda attn, y: _attend_with(attn, y, next(maps)))
        return Attended(self._summed(got))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


VIT_BLOCKS: dict[type, type] = {
    Block: ReducedBlock,
    ResPostBlock: ReducedResPostBlock,
    ParallelScalingBlock: ReducedParallelScalingBlock,
    ParallelThingsBlock: ReducedParallelThingsBlock,
}
EVA_BLOCKS: dict[type, type] = {EvaBlock: ReducedEvaBlock}
ATTENTIONS = (Attention, AttentionRope, EvaAttention)


# -- pooling and dense outputs -----------------------------------------------------------------------------------------
def pool(model: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    """timm's ``pool`` for reduced tokens: means count every token by its size, attention pooling gets log sizes."""
    state = state_of(x)
    stock = functools.partial(type(model).pool, model)
    if state is None or state.size is None:
        return stock(x, pool_type)
    p = model.num_prefix_tokens
    if model.attn_pool is not None:
        skip = 0 if getattr(model, "pool_include_prefix", True) else p
        return model.attn_pool(x[:, skip:], attn_mask=log_size(state, skip, x.dtype)[:, None, None, :])
    kind = model.global_pool if pool_type is None else pool_type
    if kind not in ("avg", "avgmax", "max"):
        return stock(x, pool_type)
    skip = 0 if getattr(model, "pool_include_prefix", False) else p
    x, size = x[:, skip:], state.size[:, skip:]
    present = x if state.valid is None else x.masked_fill(~state.valid[:, skip:, None], float("-inf"))
    if kind == "max":
        return present.amax(dim=1)
    mean = pool_mean(x, size)
    return mean if kind == "avg" else 0.5 * (present.amax(dim=1) + mean)


def forward_intermediates(model: Any, resize: Any, x: Tensor, indices: Any = None, **settings: Any) -> Any:
    """timm's ``forward_intermediates`` with every layer's tokens expanded to the full grid (zero where dropped)."""
    wanted = settings.pop("output_fmt", "NCHW")
    b, _, height, width = x.shape
    with collect_states() as states:
        got = type(model).forward_intermediates(model, x, indices, output_fmt="NLC", **settings)
    # timm returns the layers in ascending order, whatever order they were asked for.
    layers = sorted(set(feature_take_indices(len(model.blocks), indices)[0]))
    rows, cols = model.patch_embed.dynamic_feat_size((height, width))
    if resize is not None:  # a smaller image has a smaller grid
        rows, cols = resize.grid((rows, cols))

    def dense(y: Tensor, layer: int) -> Tensor:
        y = expand_patches(y, states[layer], model.num_prefix_tokens)
        return y if wanted == "NLC" else y.reshape(b, rows, cols, -1).permute(0, 3, 1, 2).contiguous()

    def each(items: list[Any]) -> list[Any]:
        pairs = zip(items, layers, strict=True)
        return [(dense(y[0], i), y[1]) if isinstance(y, tuple) else dense(y, i) for y, i in pairs]

    if isinstance(got, dict):
        return {**got, "image_intermediates": each(got["image_intermediates"])}
    return each(got) if isinstance(got, list) else (got[0], each(got[1]))


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


def _attach_resize(model: Any, reducer: Any, undo: Undo) -> None:
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


# -- finding and attaching ---------------------------------------------------------------------------------------------
def towers(model: nn.Module) -> Iterator[Tower]:
    """timm towers inside ``model``, outermost first."""
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer | Eva):
            eva = isinstance(module, Eva)
            roped = eva and module.rope is not None
            grid = module.patch_embed.grid_size
            blocks = tuple(module.blocks)
            yield Tower(
                name, module, f"timm {type(module).__name__}", blocks, EVA_BLOCKS if eva else VIT_BLOCKS,
                module.num_prefix_tokens, module.cls_token is not None, grid, EVIDENCE, "pre" if roped else None,
            )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a timm tower. Raises ``TypeError`` for block or attention classes that are not known."""
    model: Any = tower.module
    for block in tower.blocks:
        for attn in [block.attn] if hasattr(block, "attn") else [b.attn for b in getattr(block, "attns", [])]:
            if type(attn) not in ATTENTIONS:
                known, odd = ", ".join(a.__name__ for a in ATTENTIONS), type(attn).__name__
                raise TypeError(f"{tower.family}: attention class {odd} is not supported; supported: {known}")
    pooling = getattr(model, "attn_pool", None)
    if pooling is not None and type(pooling).__name__ != "AttentionPoolLatent":
        raise TypeError(f"{tower.family}: {type(pooling).__name__} cannot weigh merged tokens; AttentionPoolLatent can")
    attach_tower(tower, reducers, undo)
    undo.hook(model.norm, carry_state)
    undo.set(model, "pool", functools.partial(pool, model))
    resize = next((r for r in reducers if r.site() == "input"), None)
    undo.set(model, "forward_intermediates", functools.partial(forward_intermediates, model, resize))
    if resize is not None:
        _attach_resize(model, resize, undo)
