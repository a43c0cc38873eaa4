"""The attention of packed towers: the stock one, or its own steps where a block asks for more."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from tokenreduce.adapters.encoders.hf_attention import CALL, Call
from tokenreduce.adapters.encoders.packed import Packed

__all__ = ["PackedAsk", "ReducedQwen25Attention", "ReducedQwen2Attention", "ReducedQwen3Attention", "project"]


class PackedAsk(Call):
    """One call of a packed attention module: ``mask`` is a bias (P,) to add to the logits, or None; ``seen`` are the
    keys of every window with their bias where these are others than its own patches. Queries, keys, values and
    ``rotated`` come as (P,H,d)."""

    __slots__ = ("packed", "seen")

    def __init__(
        self, packed: Packed, bias: Tensor | None, record: bool, seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        super().__init__(bias, bias=bias is not None, record=record)
        self.packed, self.seen = packed, seen


class _Attention(nn.Module):
    """Mixin: the stock attention, or its own steps with a bias and with queries and keys shown."""

    _stock: ModuleType

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        call: PackedAsk | None = kwargs.pop(CALL, None)
        if call is None or (call.mask is None and call.seen is None and not call.record):
            if max_seqlen is not None:
                kwargs["max_seqlen"] = max_seqlen
            out: Tensor = super().forward(
                hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
            return out
        assert position_embeddings is not None
        attn: Any = self
        q, k, v, rotated = project(attn, hidden_states, position_embeddings, self._stock)
        if call.record:
            call.queries, call.keys, call.values, call.rotated = q, k, v, rotated
        name = attn.config._attn_implementation
        if (call.mask is not None or call.seen is not None) and name not in ("sdpa", "eager"):
            name = "sdpa"
        compute: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, self._stock.eager_attention_forward)
        settings = {
            "scaling": attn.scaling, "dropout": attn.attention_dropout if self.training else 0.0, "is_causal": False,
            **kwargs,
        }  # fmt: skip
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (*rotated, v))
        if "flash" in name:
            longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
            heads = compute(
                self, q, k, v, attention_mask=None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens,
                max_length_q=longest, max_length_k=longest, **settings,
            )[0]  # fmt: skip
        else:
            lengths = cu_seqlens.diff().tolist()
            windows: Any
            if call.seen is not None:
                windows = (
                    (part, k[:, :, where], v[:, :, where], bias.to(q.dtype)[None, None, None])
                    for part, (where, bias) in zip(q.split(lengths, 2), call.seen, strict=True)
                )
            else:
                added = [None] * len(lengths)
                if call.mask is not None:
                    added = list(call.mask.to(q.dtype)[None, None, None].split(lengths, 3))
                windows = zip(*(t.split(lengths, 2) for t in (q, k, v)), added, strict=True)
            heads = torch.cat([compute(self, a, b, c, attention_mask=w, **settings)[0] for a, b, c, w in windows], 1)
        out = attn.proj(heads.reshape(len(hidden_states), -1).contiguous())
        return out


def project(
    attn: Any, x: Tensor, rope: tuple[Tensor, Tensor], stock: ModuleType
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries, keys and values (P,H,d) of normed features (P,C), and queries and keys behind RoPE."""
    q, k, v = attn.qkv(x).reshape(len(x), 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    return q, k, v, stock.apply_rotary_pos_emb_vision(q, k, *rope)


class ReducedQwen2Attention(_Attention, qwen2.VisionAttention):
    _stock = qwen2


class ReducedQwen25Attention(_Attention, qwen2_5.Qwen2_5_VLVisionAttention):
    _stock = qwen2_5


class ReducedQwen3Attention(_Attention, qwen3.Qwen3VLVisionAttention):
    _stock = qwen3
