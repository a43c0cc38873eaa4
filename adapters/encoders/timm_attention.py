"""Attention modules of timm that take a key bias and show their queries and keys.

timm passes no extra arguments through its attention modules, so a patched one computes its steps here (qkv, norms,
rotary embedding, fused attention, norm, gate, projection) when it is asked something, and is the stock module
otherwise. It is called as a module either way, so hooks on it run. Keys are those after qk-norm and before RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Ask, Attended
from tokenreduce.adapters.encoders.sizes import note_form, sized_attention
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched, refuse_pre_hooks
from tokenreduce.core.undo import Undo

__all__ = ["ATTENTIONS", "Listening", "attend", "listen", "project", "scores"]

ATTENTIONS = (Attention, AttentionRope, EvaAttention)


class Listening(nn.Module):
    """Mixin of attention modules: the stock forward, or with an :class:`~tokenreduce.adapters.encoders.ask.Ask` our
    own."""

    def forward(self, x: Tensor, *args: Any, tokenreduce_ask: Ask | None = None, **kwargs: Any) -> Tensor:
        if tokenreduce_ask is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        ask, rope = tokenreduce_ask, kwargs.get("rope")
        if ask.given is not None:
            attn: Any = self
            ask.values = _grouped(attn, _qkv(attn, x)[2])
            return _close(attn, attn.attn_drop(ask.given) @ ask.values, x)
        q, k, v, rotated = _heads(self, x, rope)
        ask.queries, ask.keys, ask.values, ask.rotated = q, k, v, rotated
        if rotated is not None:
            q, k = rotated
        return _close(self, scores(q, k, v, ask.bias, self), x)


def listen(attn: nn.Module, family: str, undo: Undo) -> None:
    """Let ``attn`` take questions. Raises ``TypeError`` for a class that is not known, ``ValueError`` for a replaced
    forward."""
    if type(attn) not in ATTENTIONS:
        known, odd = ", ".join(a.__name__ for a in ATTENTIONS), type(attn).__name__
        raise TypeError(f"{family}: attention class {odd} is not supported; supported: {known}")
    refuse_own(attn)
    refuse_patched(type(attn))
    undo.mix_in(attn, Listening)
    note_form(attn, undo)


def attend(attn: nn.Module, x: Tensor, ask: Ask | None, *more: Any, **stock: Any) -> Attended:
    """The attention module on normed features ``x``; ``more`` and ``stock`` are what the block gives it besides."""
    if ask is None:
        return Attended(attn(x, *more, **stock))
    if "forward" in attn.__dict__:
        refuse_own(attn)
    out = attn(x, *more, **stock, tokenreduce_ask=ask)
    return ask.answer(out)


def project(attn: nn.Module, x: Tensor, rope: Tensor | None) -> Attended:
    """Queries, keys and values of ``x`` without attending."""
    refuse_pre_hooks(attn)
    return Attended(x, *_heads(attn, x, rope))


def _heads(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys, values (B,H,N,d), with as many heads of each, and queries and keys behind RoPE."""
    if isinstance(attn, Attention):  # as many heads of each, and no rotation
        return *_qkv(attn, x), None
    q, k, v = _qkv(attn, x)
    rotated = None
    if rope is not None:
        turned = _rotate(attn, q, k, v, rope)
        rotated = turned[0], _grouped(attn, turned[1])
    return q, _grouped(attn, k), _grouped(attn, v), rotated


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (after qk-norm, before RoPE) and values, (B,H,N,d); kv heads as they are."""
    b, n, _ = x.shape
    if isinstance(attn, Attention):
        parts: Any = attn._modules
        q, k, v = parts["qkv"](x).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return parts["q_norm"](q), parts["k_norm"](k), v
    if getattr(attn, "qkv", None) is not None:
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, weight=attn.qkv.weight, bias=bias)
        width = qkv.shape[-1] // (3 * attn.num_heads)
        q, k, v = qkv.reshape(b, n, 3, attn.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        projected = zip((attn.num_heads, kv_heads, kv_heads), (attn.q_proj, attn.k_proj, attn.v_proj), strict=True)
        q, k, v = (projection(x).unflatten(2, (heads, -1)).transpose(1, 2) for heads, projection in projected)
    return (attn.q_norm(q), attn.k_norm(k), v) if hasattr(attn, "q_norm") else (q, k, v)


def _rotate(attn: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    p, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

    def turn(t: Tensor) -> Tensor:
        return torch.cat([t[:, :, :p], apply_rot_embed_cat(t[:, :, p:], rope, half=half)], dim=2).type_as(v)

    return turn(q), turn(k)


def _grouped(attn: Any, t: Tensor) -> Tensor:
    groups = getattr(attn, "num_kv_groups", 1)
    return t.repeat_interleave(groups, dim=1) if groups > 1 else t


def scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attn: Any) -> Tensor:
    """Attention output (B,H,N,d), fused where the stock module is, in the stock module's order of operations."""
    if attn.fused_attn:
        return sized_attention(attn, q, k, v, bias, attn.attn_drop.p if attn.training else 0.0)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return attn.attn_drop(logits.softmax(dim=-1)) @ v


def _close(attn: Any, heads: Tensor, x: Tensor) -> Tensor:
    """Heads (B,H,N,d) to the attention module's output (B,N,C)."""
    parts = attn._modules  # what a class does not have costs an exception to ask a module for
    gate = attn.gate(x).sigmoid() if parts.get("gate") is not None else None
    out = heads.transpose(1, 2).flatten(2)
    out = parts["norm"](out) if "norm" in parts else out
    if gate is not None:
        out = out * gate
    return parts["proj_drop"](parts["proj"](out))
