"""Blocks of the vision transformers of timm that are neither ``VisionTransformer`` nor ``Eva``, see
:mod:`tokenreduce.adapters.encoders.timm_others`. All are mixins, so that no module of timm has to be there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Ask, Attended, asks
from tokenreduce.adapters.encoders.sizes import sized_attention
from tokenreduce.adapters.encoders.state import State, entry_of, set_state, state_of
from tokenreduce.adapters.encoders.stock import refuse_own
from tokenreduce.adapters.encoders.timm import ReducedBlock, ReducedEvaBlock, _no_mask, _rope_rows, _TimmBlock
from tokenreduce.adapters.encoders.timm_attention import attend

__all__ = [
    "BeitBlock", "Branched", "CaitBlock", "Gemma4Block", "ListeningGemma4", "ListeningTalkingHeads", "NaFlexBlock",
    "NaFlexEvaBlock", "PostNormedRelPosBlock", "RelPosBlock", "RopedBlock", "WeighedClassBlock",
]  # fmt: skip


# -- blocks: two branches, each with a scale and stochastic depth ----------------------------------------------------
class Branched(_TimmBlock):
    """Blocks of two branches whose norm comes first."""

    def _scaled(self, half: int, y: Tensor) -> Tensor:
        me: Any = self
        if hasattr(me, f"ls{half}"):
            y = getattr(me, f"ls{half}")(y)
        elif getattr(me, f"gamma_{half}", None) is not None:
            y = getattr(me, f"gamma_{half}") * y
        return getattr(me, f"drop_path{half}" if hasattr(me, "drop_path1") else "drop_path")(y)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self._scaled(1, out)

    def _feed_forward(self, x: Tensor) -> Tensor:
        me: Any = self
        return x + self._scaled(2, me.mlp(me.norm2(x)))


class _PostNormed(Branched):
    """Blocks of two branches that end in a norm."""

    def _normed(self, x: Tensor) -> Tensor:
        return x

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self._scaled(1, self.norm1(out))  # type: ignore[attr-defined]

    def _feed_forward(self, x: Tensor) -> Tensor:
        me: Any = self
        return x + self._scaled(2, me.norm2(me.mlp(x)))


class RopedBlock(Branched):
    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        _no_mask(attn_mask, is_causal)
        return self._run(x, rope)

    def _stock(self, context: Any) -> dict[str, Any]:
        return {"rope": context}

    def _context(self, context: Any, state: State) -> Any:
        return _rope_rows(context, state, self.attn.num_prefix_tokens)


# -- biases by relative position ---------------------------------------------------------------------------------------
class _Table(NamedTuple):
    """The bias that all blocks share, the bias (B or 1,H,N,N) of the tokens that are left, the one to add (as the stock
    module lays it out), and whether all tokens are left."""

    shared: Tensor | None
    table: Tensor | None = None
    added: Tensor | None = None
    plain: bool = True


class _Biased(Branched):
    """Every token that is left keeps the biases of its representative, as a query and as a key."""

    #: The name of the shared bias among the arguments of blocks and attention.
    shared = "shared_rel_pos_bias"

    def _own(self) -> Tensor | None:
        raise NotImplementedError("abstract")

    def _context(self, context: Any, state: State) -> Any:
        site = self.__dict__["_tokenreduce_site"]
        plain = state.acted is None
        if plain and (site.reducer is None or not asks(None, site.reducer.required())):
            return context
        own, table = self._own(), context.shared
        if own is not None:
            table = own if table is None or self.shared == "shared_rel_pos" else own + table
        added = table
        if table is not None:
            table = table.reshape(-1, *table.shape[-3:])  # BEiT's shared one is (H,N,N)
        if table is not None and state.origin is not None:
            one, two = state.origin.unsqueeze(2), state.origin.unsqueeze(1)
            table = table[0][:, one, two].transpose(0, 1)  # (B,H,K,K)
        return _Table(context.shared, table, added if plain else table, plain)

    def _stock(self, context: Any) -> dict[str, Any]:
        return {self.shared: context.shared}

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        both = [t for t in (bias, context.added) if t is not None]
        added = None if not both else both[0] if len(both) == 1 else both[0] + both[1].to(both[0].dtype)
        ask = Ask(added, needs) if not context.plain or asks(None, needs) else None
        return attend(self.attn, self._normed(x), ask, **self._stock(context))._replace(table=context.table)

    def _project(self, x: Tensor, context: Any) -> Attended:
        return super()._project(x, None)._replace(table=context.table)


class BeitBlock(_Biased):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._run(x, _Table(shared_rel_pos_bias))

    def _own(self) -> Tensor | None:
        attn = self.attn
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()


class RelPosBlock(_Biased):
    shared = "shared_rel_pos"

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._run(x, _Table(shared_rel_pos))

    def _own(self) -> Tensor | None:
        return None if self.attn.rel_pos is None else self.attn.rel_pos.get_bias()


class PostNormedRelPosBlock(_PostNormed, _Biased):
    shared = "shared_rel_pos"
    forward = RelPosBlock.forward  # type: ignore[assignment]
    _own = RelPosBlock._own


# -- masks of images of several sizes ----------------------------------------------------------------------------------
class _Masked(NamedTuple):
    """Rotary tables and the mask of tokens that are there, which counts while no plan has acted."""

    rope: Any = None
    mask: Tensor | None = None
    plain: bool = True


class _MaskedBlock(_TimmBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        _no_mask(None, is_causal)
        if self.__dict__["_tokenreduce_site"].layer == 0:
            _note_there(x, attn_mask)
        return self._run(x, _Masked(rope, attn_mask))

    def _context(self, context: Any, state: State) -> Any:
        prefix = getattr(self.attn, "num_prefix_tokens", 0)
        rope = None if context.rope is None else _rope_rows(context.rope, state, prefix)
        return context._replace(rope=rope, plain=state.acted is None)

    def _stock(self, context: Any) -> dict[str, Any]:
        roped = {} if context.rope is None else {"rope": context.rope}
        return {"attn_mask": context.mask if context.plain else None, **roped}

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        bias = context.mask if context.plain else bias
        ask = Ask(bias, needs) if asks(None if context.plain else bias, needs) else None
        return attend(self.attn, self._normed(x), ask, **self._stock(context))

    def _project(self, x: Tensor, context: Any) -> Attended:
        return super()._project(x, context.rope)


def _note_there(x: Tensor, mask: Tensor | None) -> None:
    """Start the state of tokens (B,N,C) of which some are not there, by the mask (B,1,1 or N,N) of the first block."""
    if mask is None:
        return
    row = mask[:, 0, 0]
    valid = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    entry = entry_of(x)
    valid = valid.expand(x.shape[0], -1)
    set_state(x, State(x.shape[1], valid.float(), valid, grid=None if entry is None else entry.grid))


class NaFlexBlock(_MaskedBlock, ReducedBlock):  # type: ignore[misc]
    pass


class NaFlexEvaBlock(_MaskedBlock, ReducedEvaBlock):
    pass


# -- CaiT --------------------------------------------------------------------------------------------------------------
class CaitBlock(Branched):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self._run(x)

    def _stock(self, context: Any) -> dict[str, Any]:
        return {}


class ListeningTalkingHeads(nn.Module):
    """Mixin of CaiT's attention, which mixes heads before and behind the softmax: biases are added between."""

    def forward(self, x: Tensor, tokenreduce_ask: Ask | None = None) -> Tensor:
        if tokenreduce_ask is None:
            out: Tensor = super().forward(x)
            return out
        me: Any = self
        ask = tokenreduce_ask
        b, n, c = x.shape
        q, k, v = me.qkv(x).reshape(b, n, 3, me.num_heads, c // me.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        ask.queries, ask.keys, ask.values = q, k, v
        logits = (q * me.scale) @ k.transpose(-2, -1)
        logits = me.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        rows = (logits if ask.bias is None else logits + ask.bias).softmax(dim=-1)
        rows = me.attn_drop(me.proj_w(rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return me.proj_drop(me.proj((rows @ v).transpose(1, 2).reshape(b, n, c)))


class WeighedClassBlock(nn.Module):
    """Mixin of CaiT's blocks of class attention: the class token sees what is left, weighed by size."""

    def forward(self, x: Tensor, x_cls: Tensor) -> Tensor:
        state, me = state_of(x), self
        bias = None if state is None else state.bias(x.dtype)
        if bias is None:
            out: Tensor = super().forward(x, x_cls)
            return out
        block: Any = me
        attn, y = block.attn, block.norm1(torch.cat((x_cls, x), dim=1))
        refuse_own(attn)
        q, k, v = (p(t).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                   for p, t in ((attn.q, y[:, :1]), (attn.k, y), (attn.v, y)))  # fmt: skip
        drop = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(bias, (1, 0)), dropout_p=drop)
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(x_cls.shape)))
        x_cls = x_cls + block.drop_path(block.gamma_1 * out)
        return x_cls + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x_cls)))


# -- Gemma 4 -----------------------------------------------------------------------------------------------------------
class Gemma4Block(_MaskedBlock):
    """Norms before and behind both branches; rotary tables are (cos, sin) per sample."""

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, (rope_cos, rope_sin), attn_mask)

    def _context(self, context: Any, state: State) -> Any:
        rope = context.rope
        if state.origin is not None:
            rope = tuple(t.gather(1, state.origin.unsqueeze(-1).expand(-1, -1, t.shape[-1])) for t in rope)
        return context._replace(rope=rope, plain=state.acted is None)

    def _stock(self, context: Any) -> dict[str, Any]:
        return {"attn_mask": context.mask if context.plain else None}

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        bias = context.mask if context.plain else bias
        ask = Ask(bias, needs) if asks(None if context.plain else bias, needs) else None
        return attend(self.attn, self._normed(x), ask, *context.rope, **self._stock(context))

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        ask = Ask(given=attention)
        return attend(self.attn, self._normed(x), ask, *context.rope, **self._stock(context))

    def _project(self, x: Tensor, context: Any) -> Attended:
        ask = Ask(context.mask if context.plain else None, ("keys",))
        return attend(self.attn, self._normed(x), ask, *context.rope, **self._stock(context))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        me: Any = self
        return x + me.drop_path(me.norm2(out))

    def _feed_forward(self, x: Tensor) -> Tensor:
        me: Any = self
        return x + me.drop_path(me.norm4(me.mlp(me.norm3(x))))

    _scale = 1.0


class ListeningGemma4(nn.Module):
    """Mixin of Gemma 4's attention; queries and keys are shown behind RoPE."""

    def forward(
        self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Any = None, tokenreduce_ask: Ask | None = None
    ) -> Tensor:
        if tokenreduce_ask is None:
            out: Tensor = super().forward(x, rope_cos, rope_sin, attn_mask=attn_mask)
            return out
        from timm.models.gemma4_vit import apply_multidimensional_rope

        me: Any = self
        ask = tokenreduce_ask
        q, k, v = (
            norm(projection(x).unflatten(-1, (-1, me.head_dim)))
            for projection, norm in ((me.q_proj, me.q_norm), (me.k_proj, me.k_norm), (me.v_proj, me.v_norm))
        )
        q, k = (apply_multidimensional_rope(t, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if me.num_kv_groups > 1:
            k, v = (t.repeat_interleave(me.num_kv_groups, dim=1) for t in (k, v))
        ask.queries, ask.keys, ask.values = q, k, v
        drop = me.attn_drop.p if me.training else 0.0
        if ask.given is not None:
            y = F.dropout(ask.given, drop) @ v
        elif me.fused_attn:
            y = sized_attention(me, q, k, v, ask.bias, drop, 1.0)
        else:
            logits = q @ k.transpose(-2, -1)
            y = me.attn_drop((logits if ask.bias is None else logits + ask.bias).softmax(dim=-1)) @ v
        return me.proj_drop(me.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1)))
