"""Many questions behind one image in one pass of a Llama: the prefix is computed once, questions do not see each other.

Each question attends to the whole prefix and causally to itself, with position ids that go on behind the prefix: the
same result as one pass per question, at a fraction of the cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed"]


def packed(
    language: Any, prefix: Tensor, positions: Tensor, questions: Tensor, places: Tensor, *, taps: Collection[int] = (),
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Final hidden states (B,Q,T,D), normalised, of ``questions`` (B,Q,T,D) behind ``prefix`` (B,P,D), embeddings both.

    ``language`` is a ``LlamaModel``; ``positions`` (B,P) and ``places`` (B,Q,T) are position ids. Also returns what the
    prefix is behind the layers ``taps``, (B,P,D) each. ``watch(layer, weights)`` sees how the questions attend to the
    prefix in every layer, (B,H,Q,T,P).
    """
    q, t, d = questions.shape[1:]
    b, p = positions.shape
    x = torch.cat([prefix, questions.flatten(1, 2)], 1)
    cos, sin = language.rotary_emb(x, torch.cat([positions, places.flatten(1)], 1))
    cos, sin = cos[:, :, None], sin[:, :, None]
    tapped = []
    for i, module in enumerate(language.layers):
        attn, mlp = module.self_attn, module.mlp
        weights = (
            module.input_layernorm.weight, torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]),
            attn.o_proj.weight, module.post_attention_layernorm.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight,
        )  # fmt: skip
        # Nothing reads the prefix behind the last layer.
        skip = i == len(language.layers) - 1
        see = None if watch is None else functools.partial(watch, i)
        eps = module.input_layernorm.variance_epsilon
        x = _layer(x, cos, sin, weights, p, q, t, attn.head_dim, eps, skip, see)
        if i in taps:
            tapped.append(x[:, :p])
    return language.norm(x).view(b, q, t, d), tapped


def _layer(
    x: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor, ...], p: int, q: int, t: int, d: int, eps: float,
    skip: bool, see: Callable[[Tensor], None] | None,
) -> Tensor:  # fmt: skip
    """One Llama layer over a prefix of ``p`` tokens and ``q`` questions of ``t`` tokens, (B,p+q*t,D); with ``skip``
    only the questions come out."""
    norm1, qkv, out, norm2, gate_up, down = weights
    b, n, width = x.shape
    heads = F.linear(F.rms_norm(x, (width,), norm1, eps), qkv).view(b, n, -1, d)
    many = out.shape[1] // d  # query heads
    few = (heads.shape[2] - many) // 2  # key heads, each for a group of query heads
    with torch.autocast(x.device.type, enabled=False):  # softmax in the precision of the products, and fewer copies
        turned = _rotate(heads[:, :, : many + few], cos.to(heads.dtype), sin.to(heads.dtype)).transpose(1, 2)
        query, key, value = turned[:, :many] * d**-0.5, turned[:, many:], heads[:, :, many + few :].transpose(1, 2)
        if few < many:
            key, value = (a.repeat_interleave(many // few, 1) for a in (key, value))
        seen = _question_rows(query[:, :, p:], key, value, p, q, t, see)
        if not skip:
            scores = query[:, :, :p] @ key[:, :, :p].transpose(-2, -1)
            scores = scores + _future(p, scores)
            seen = torch.cat([scores.softmax(-1) @ value[:, :, :p], seen], 2)
    x = (x[:, p:] if skip else x) + F.linear(seen.transpose(1, 2).flatten(2), out)
    gate, up = F.linear(F.rms_norm(x, (width,), norm2, eps), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def _future(n: int, like: Tensor) -> Tensor:
    return torch.full((n, n), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _question_rows(
    query: Tensor, key: Tensor, value: Tensor, p: int, q: int, t: int, see: Callable[[Tensor], None] | None
) -> Tensor:
    """Attention output (B,H,Q*T,d) of the question tokens: one softmax over the prefix and the question itself."""
    b, h, _, d = query.shape
    own = (b, h, q, t, d)
    to_prefix = (query @ key[:, :, :p].transpose(-2, -1)).view(b, h, q, t, p)
    to_self = query.reshape(own) @ key[:, :, p:].reshape(own).transpose(-2, -1)
    weights = torch.cat([to_prefix, to_self + _future(t, to_self)], -1).softmax(-1)
    if see is not None:
        see(weights[..., :p])
    out = (weights[..., :p].reshape(b, h, q * t, p) @ value[:, :, :p]).view(own)
    return (out + weights[..., p:] @ value[:, :, p:].reshape(own)).flatten(2, 3)
