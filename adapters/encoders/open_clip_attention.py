"""Attention modules of open_clip that take a key bias and show their queries and keys.

``nn.MultiheadAttention`` and open_clip's ``Attention`` are called as modules by a patched block, so hooks on them run;
asked for more than their output, they compute their own steps here. Keys and queries are those after qk-norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.utils.parametrize import type_before_parametrizations

from tokenreduce.adapters.encoders.block import Ask
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched, refuse_pre_hooks
from tokenreduce.core.undo import Undo

__all__ = ["listen", "show"]

Heads = tuple[Tensor, Tensor, Tensor]
SEQUENCE_FIRST = "a sequence-first transformer loses the token sizes when it transposes; build it with batch_first=True"


def _split(attn: Any, x: Tensor) -> Heads:
    """Queries, keys and values (B,H,N,d) of one packed projection, before qk-norm."""
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def _apart(attn: Any, *inputs: Tensor) -> Heads:
    """The same of a query, a key and a value that are different tensors."""
    weights = attn.in_proj_weight.chunk(3)
    biases = (None, None, None) if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    return q, k, v


def _values(attn: Any, x: Tensor) -> Tensor:
    """Values (B,H,N,d) alone."""
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
    v = F.linear(x, attn.in_proj_weight.chunk(3)[2], bias)
    return v.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


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


def _exactly(attn: Any, x: Tensor, queries: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        q, k, v = (t.view(n, b * h, c // h).transpose(0, 1).view(b, h, n, c // h) for t in packed)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=_dropout(attn))
        out = F.linear(out.permute(2, 0, 1, 3).reshape(b * n, c), attn.out_proj.weight, attn.out_proj.bias)
        return out.view(n, b, c).transpose(0, 1), q, k, v
    if torch.is_autocast_enabled(x.device.type):  # on CPU, where the kernel casts its arguments by itself
        return nn.MultiheadAttention.forward(attn, x, x, x, need_weights=False)[0], *_split(attn, x)
    if x.is_cuda and (c // h) % 8 == 0:
        like = x.view(b, n, h, c // h).transpose(1, 2)
        if torch._fused_sdp_choice(like, like, like) != SDPBackend.MATH.value:
            q, k, v = _split(attn, x)
            return _join(attn, F.scaled_dot_product_attention(q, k, v)), q, k, v
    q, k, v = torch._transform_bias_rescale_qkv(x @ weight.t(), bias, h)
    flat = (b * h, n, c // h)
    attention = torch.bmm(q.view(flat), k.view(flat).transpose(1, 2))
    attention = torch.softmax(attention, -1, out=attention)
    out = torch.bmm(attention, v.view(flat)).view(b, h, n, c // h)
    out = F.linear(out.transpose(1, 2).reshape(b * n, c), attn.out_proj.weight, attn.out_proj.bias).view(b, n, c)
    return out, q * math.sqrt(c // h) if queries else q, k, v


class ListeningMultihead(nn.Module):
    """Mixin of ``nn.MultiheadAttention``: the stock forward, or self-attention with an
    :class:`~tokenreduce.adapters.encoders.block.Ask`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, tokenreduce_ask: Ask | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if tokenreduce_ask is None:
            out: tuple[Tensor, Tensor | None] = super().forward(query, key, value, *args, **kwargs)
            return out
        ask = tokenreduce_ask
        attn: Any = self
        if ask.given is not None:
            ask.values = _values(attn, value)
            attention = F.dropout(ask.given.to(ask.values.dtype), attn.dropout, attn.training)
            return _join(attn, attention @ ask.values), None
        one = key is query and value is query  # a hook may give it three tensors
        if one and ask.bias is None and not torch.compiler.is_compiling():
            exact, ask.queries, ask.keys, ask.values = _exactly(attn, query, {"queries", "attention"} & {*ask.needs})
            return exact, None
        ask.queries, ask.keys, ask.values = _split(attn, query) if one else _apart(attn, query, key, value)
        if ask.bias is None and not one:
            return super().forward(query, key, value, *args, **kwargs)
        q, k, v = ask.queries, ask.keys, ask.values
        bias = None if ask.bias is None else ask.bias.to(q.dtype)
        return _join(attn, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=_dropout(attn))), None


class ListeningAttention(nn.Module):
    """The same for open_clip's own ``Attention``."""

    def forward(self, x: Tensor, *args: Any, tokenreduce_ask: Ask | None = None, **kwargs: Any) -> Tensor:
        if tokenreduce_ask is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        ask = tokenreduce_ask
        attn: Any = self
        if ask.given is not None:
            ask.values = _values(attn, x)
            heads = attn.attn_drop(ask.given.to(ask.values.dtype)) @ ask.values
        else:
            q, k, v = ask.queries, ask.keys, ask.values = _normalised(attn, x)
            bias = None if ask.bias is None else ask.bias.to(q.dtype)
            p = attn.attn_drop.p if attn.training else 0.0
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        if attn.head_scale is not None:
            heads = heads * attn.head_scale
        return attn.out_drop(attn.out_proj(attn.ln_inner(heads.transpose(1, 2).flatten(2))))


def _normalised(attn: Any, x: Tensor) -> Heads:
    q, k, v = _split(attn, x)
    return attn.ln_q(q), attn.ln_k(k), v


#: Block class -> class of its attention, and our mixin for it.
_KINDS: dict[type, tuple[type, type]] = {
    ResidualAttentionBlock: (nn.MultiheadAttention, ListeningMultihead),
    CustomResidualAttentionBlock: (Attention, ListeningAttention),
}


def show(attn: Any, x: Tensor) -> Heads:
    """Queries, keys and values (B,H,N,d) of normed features ``x`` without attending."""
    refuse_pre_hooks(attn)
    return _split(attn, x) if isinstance(attn, nn.MultiheadAttention) else _normalised(attn, x)


def listen(block: Any, kind: type, family: str, undo: Undo) -> None:
    """Let the attention of a block of class ``kind`` take questions.

    Raises ``TypeError`` for an attention that is not known or cannot be served, ``ValueError`` for replaced methods.
    """
    attn, (stock, mixin) = block.attn, _KINDS[kind]
    if type_before_parametrizations(attn) is not stock:  # a subclass may compute something else
        raise TypeError(
            f"{family}: attention class {type(attn).__name__} is not supported; supported: {stock.__name__}"
        )
    if not getattr(attn, "batch_first", True):
        raise TypeError(f"{family}: {SEQUENCE_FIRST}")
    if getattr(attn, "logit_scale", None) is not None:
        raise TypeError(
            f"{family}: scaled cosine attention (scaled_cosine_attn=True) is not supported, open_clip cannot "
            "run it either; build the tower without it (qk_norm=True is supported)"
        )
    if stock is nn.MultiheadAttention and (
        attn.bias_k is not None or attn.add_zero_attn or attn.in_proj_weight is None
    ):
        raise TypeError(
            f"{family}: MultiheadAttention with add_bias_kv, add_zero_attn, kdim or vdim is not supported; "
            "supported is plain self-attention"
        )
    refuse_own(attn)
    refuse_own(block, "attention")
    refuse_patched(stock)
    if hasattr(kind, "attention"):
        refuse_patched(kind, "attention")
    undo.mix_in(attn, mixin)
