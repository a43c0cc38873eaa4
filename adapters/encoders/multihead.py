"""``nn.MultiheadAttention`` that takes a key bias and shows its queries and keys (open_clip, torchvision).

It is called as a module by a patched block, so hooks on it run; asked for more than its output, it computes its own
steps here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.utils.parametrize import type_before_parametrizations

from tokenreduce.adapters.encoders.ask import Ask
from tokenreduce.adapters.encoders.sizes import note_form, sized_attention
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.core.undo import Undo

__all__ = ["Heads", "ListeningMultihead", "listen_multihead", "refuse_multihead", "split", "values_of"]

Heads = tuple[Tensor, Tensor, Tensor]


def split(attn: Any, x: Tensor) -> Heads:
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


def values_of(attn: Any, x: Tensor) -> Tensor:
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
        return nn.MultiheadAttention.forward(attn, x, x, x, need_weights=False)[0], *split(attn, x)
    if x.is_cuda and (c // h) % 8 == 0:
        like = x.view(b, n, h, c // h).transpose(1, 2)
        if torch._fused_sdp_choice(like, like, like) != SDPBackend.MATH.value:
            q, k, v = split(attn, x)
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
    :class:`~tokenreduce.adapters.encoders.ask.Ask`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, tokenreduce_ask: Ask | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if tokenreduce_ask is None:
            out: tuple[Tensor, Tensor | None] = super().forward(query, key, value, *args, **kwargs)
            return out
        ask = tokenreduce_ask
        attn: Any = self
        if ask.given is not None:
            ask.values = values_of(attn, value)
            attention = F.dropout(ask.given.to(ask.values.dtype), attn.dropout, attn.training)
            return _join(attn, attention @ ask.values), None
        one = key is query and value is query  # a hook may give it three tensors
        if one and ask.bias is None and not torch.compiler.is_compiling():
            exact, ask.queries, ask.keys, ask.values = _exactly(attn, query, {"queries", "attention"} & {*ask.needs})
            return exact, None
        ask.queries, ask.keys, ask.values = split(attn, query) if one else _apart(attn, query, key, value)
        if ask.bias is None and not one:
            return super().forward(query, key, value, *args, **kwargs)
        q, k, v = ask.queries, ask.keys, ask.values
        bias = None if ask.bias is None else ask.bias.to(q.dtype)
        return _join(attn, sized_attention(attn, q, k, v, bias, _dropout(attn))), None


def refuse_multihead(attn: Any, family: str) -> None:
    """Raise ``TypeError`` for an attention that is no plain self-attention of the stock class."""
    if type_before_parametrizations(attn) is not nn.MultiheadAttention:  # a subclass may compute something else
        raise TypeError(
            f"{family}: attention class {type(attn).__name__} is not supported; supported: MultiheadAttention"
        )
    if attn.bias_k is not None or attn.add_zero_attn or attn.in_proj_weight is None:
        raise TypeError(
            f"{family}: MultiheadAttention with add_bias_kv, add_zero_attn, kdim or vdim is not supported; "
            "supported is plain self-attention"
        )


def listen_multihead(attn: nn.Module, family: str, undo: Undo) -> None:
    """Let ``attn`` take questions. Raises as :func:`refuse_multihead`, and ``ValueError`` for replaced methods."""
    refuse_multihead(attn, family)
    refuse_own(attn)
    refuse_patched(nn.MultiheadAttention)
    undo.mix_in(attn, ListeningMultihead)
    note_form(attn, undo)
