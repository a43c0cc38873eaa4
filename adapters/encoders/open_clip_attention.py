"""Attention modules of open_clip that take a key bias and show their queries and keys.

``nn.MultiheadAttention`` (:mod:`tokenreduce.adapters.encoders.multihead`) and open_clip's ``Attention`` are called as
modules by a patched block, so hooks on them run; asked for more than its output, the latter computes its own steps
here. Keys and queries are those after qk-norm.
"""

from __future__ import annotations

from typing import Any

from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from tokenreduce.adapters.encoders.ask import Ask
from tokenreduce.adapters.encoders.multihead import Heads, ListeningMultihead, refuse_multihead, split, values_of
from tokenreduce.adapters.encoders.sizes import note_form, sized_attention
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched, refuse_pre_hooks
from tokenreduce.core.undo import Undo

__all__ = ["listen", "show"]

SEQUENCE_FIRST = "a sequence-first transformer loses the token sizes when it transposes; build it with batch_first=True"


class ListeningAttention(nn.Module):
    """The same for open_clip's own ``Attention``."""

    def forward(self, x: Tensor, *args: Any, tokenreduce_ask: Ask | None = None, **kwargs: Any) -> Tensor:
        if tokenreduce_ask is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        ask = tokenreduce_ask
        attn: Any = self
        if ask.given is not None:
            ask.values = values_of(attn, x)
            heads = attn.attn_drop(ask.given.to(ask.values.dtype)) @ ask.values
        else:
            q, k, v = ask.queries, ask.keys, ask.values = _normalised(attn, x)
            bias = None if ask.bias is None else ask.bias.to(q.dtype)
            p = attn.attn_drop.p if attn.training else 0.0
            heads = sized_attention(attn, q, k, v, bias, p)
        if attn.head_scale is not None:
            heads = heads * attn.head_scale
        return attn.out_drop(attn.out_proj(attn.ln_inner(heads.transpose(1, 2).flatten(2))))


def _normalised(attn: Any, x: Tensor) -> Heads:
    q, k, v = split(attn, x)
    return attn.ln_q(q), attn.ln_k(k), v


#: Block class -> class of its attention, and our mixin for it.
_KINDS: dict[type, tuple[type, type]] = {
    ResidualAttentionBlock: (nn.MultiheadAttention, ListeningMultihead),
    CustomResidualAttentionBlock: (Attention, ListeningAttention),
}


def show(attn: Any, x: Tensor) -> Heads:
    """Queries, keys and values (B,H,N,d) of normed features ``x`` without attending."""
    refuse_pre_hooks(attn)
    return split(attn, x) if isinstance(attn, nn.MultiheadAttention) else _normalised(attn, x)


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
    if stock is nn.MultiheadAttention:
        refuse_multihead(attn, family)
    refuse_own(attn)
    refuse_own(block, "attention")
    refuse_patched(stock)
    if hasattr(kind, "attention"):
        refuse_patched(kind, "attention")
    undo.mix_in(attn, mixin)
    note_form(attn, undo)
