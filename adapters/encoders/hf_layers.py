"""Layers of transformers vision encoders that reduce their tokens.

Layers are swapped, attention modules stay: queries and keys come from a registered attention function
(:mod:`tokenreduce.adapters.encoders.hf_attention`), which ends in the model's own kernel. While no plan has acted, a
layer gets
exactly its stock arguments. Keys are those before RoPE (DINOv3): a recording layer's attention module gets empty
rotary tables and the attention function rotates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.internvl import modeling_internvl as internvl
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.smolvlm import modeling_smolvlm as smolvlm
from transformers.models.vit import modeling_vit as vit

from tokenreduce.adapters.encoders.ask import Attended
from tokenreduce.adapters.encoders.block import Reduced, View
from tokenreduce.adapters.encoders.hf_attention import CALL, Call
from tokenreduce.adapters.encoders.joint import JointState
from tokenreduce.adapters.encoders.site import Site
from tokenreduce.adapters.encoders.state import State, entry_of, set_state
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_pre_hooks
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.reducer import Reducer

__all__ = [
    "EVIDENCE", "Context", "ReducedCLIPLayer", "ReducedDINOv3Layer", "ReducedDinov2Layer",
    "ReducedDinov2RegistersLayer", "ReducedIdefics3Layer", "ReducedInternVLLayer", "ReducedSiglip2Layer",
    "ReducedSiglipLayer", "ReducedSmolVLMLayer", "ReducedViTLayer",
]  # fmt: skip

EVIDENCE = ("keys", "queries", "values", "attention", "before")
#: Evidence that only an attention call can give.
_SEEN = frozenset(("keys", "queries", "values", "attention"))


class Context(NamedTuple):
    """What a layer was called with besides its tokens; ``plain`` while no plan has acted on them. ``table`` (B or
    1,H,N,N) is a bias by relative position, for the tokens that are left."""

    mask: Any
    kwargs: dict[str, Any]
    plain: bool = True
    table: Tensor | None = None


def _heads(x: Tensor, projection: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """(B,N,C) to (B,H,N,d)."""
    return projection(x).view(*x.shape[:-1], -1, width).transpose(1, 2)


class _Layer(Reduced):
    """Layers called with ``(hidden_states, attention_mask, **kwargs)``; subclasses name their parts."""

    _tokenreduce_site: Site
    norms: tuple[str, str] = ("norm1", "norm2")
    attention_name: str = "attention"
    #: Attention modules that drop or reserve ``attention_mask`` in some versions carry the call by keyword.
    by_keyword: bool = False
    #: The stock layer calls its attention with keywords alone, which pre-hooks on it see.
    all_keywords: bool = False

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        if self._tokenreduce_site.layer == 0 and attention_mask is not None:
            _note_padding(hidden_states, attention_mask)
        return self._run(hidden_states, Context(attention_mask, kwargs))

    def _context(self, context: Any, state: State) -> Any:
        return context if state.acted is None else context._replace(plain=False)

    # -- several frames in a row
    def _reduce(
        self, site: Site, reducer: Reducer, x: Tensor, state: State, got: Attended, before: Tensor | None
    ) -> tuple[Tensor, State]:
        if not isinstance(state, JointState):
            return super()._reduce(site, reducer, x, state, got, before)
        frames = x
        if state.acted is None:
            x, got = state.row(x), state.seen(got)
            before = None if before is None else state.row(before)
        x, left = super()._reduce(state.site(site), reducer, x, state, got, before)
        return (frames, state) if left is state else (x, left)

    def _evidence(
        self, site: Site, x: Tensor, state: State, got: Attended, before: Tensor | None, view: View | None = None
    ) -> EncoderEvidence:
        if isinstance(state, JointState):
            needs = () if site.reducer is None else site.reducer.required()
            view = state.view(x, attention="attention" in needs or "queries" in needs)
        return super()._evidence(site, x, state, got, before, view)

    # -- attention half
    def _normed(self, x: Tensor) -> Tensor:
        return getattr(self, self.norms[0])(x)

    def _core(self) -> tuple[Any, Any]:
        """The attention module, and the one with the projections: early 5.x releases nest it in DINOv2."""
        attn = getattr(self, self.attention_name)
        return attn, getattr(attn, "attention", attn)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        record = not _SEEN.isdisjoint(needs)
        if context.plain and not record:
            return Attended(self._call(x, context.mask, context.kwargs))
        call = Call(context.mask if context.plain else bias, bias=not context.plain, record=record)
        out = self._call(x, call, context.kwargs)
        return Attended(out, call.queries, call.keys, call.values, call.rotated)

    def _call(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        attn, core = self._core()
        if isinstance(mask, Call):
            refuse_own(attn)
            refuse_own(core)
        y = self._normed(x)
        if self.all_keywords:
            got = attn(hidden_states=y, attention_mask=mask, **kwargs)
        elif not self.by_keyword:
            got = attn(y, attention_mask=mask, **kwargs)
        else:
            name = CALL if isinstance(mask, Call) else "attention_mask"
            got = attn(y, **({} if mask is None else {name: mask}), **kwargs)
        if isinstance(mask, Call) and not mask.reached:
            raise RuntimeError(
                f"{type(attn).__name__} ran other code than its library's, which ignored token sizes; call tr.unpatch, "
                "undo what replaced it, and patch again"
            )
        return got[0] if isinstance(got, tuple) else got

    def _project(self, x: Tensor, context: Any) -> Attended:
        attn, core = self._core()
        for module in (attn, core):
            refuse_pre_hooks(module)
        y, width = self._normed(x), _width(core)
        old = core is not attn
        q, k = (_heads(y, projection, width) for projection in self._projections(core, old))
        reducer = self._tokenreduce_site.reducer
        needs = () if reducer is None else reducer.required()
        v = _heads(y, core.value if old else core.v_proj, width) if "values" in needs else None
        return Attended(x, q, k, v, self._rotate(q, k, context))

    def _projections(self, core: Any, old: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return (core.query, core.key) if old else (core.q_proj, core.k_proj)

    def _rotate(self, q: Tensor, k: Tensor, context: Any) -> tuple[Tensor, Tensor] | None:
        return None

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        call = Call(record=True, given=attention)
        return Attended(self._call(x, call, context.kwargs), values=call.values)

    # -- the rest: plain residual branches (CLIP, SigLIP)
    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(getattr(self, self.norms[1])(x))  # type: ignore[attr-defined]


def _width(attn: Any) -> int:
    return attn.head_dim if hasattr(attn, "head_dim") else attn.attention_head_size


def _note_padding(x: Tensor, mask: Any) -> None:
    """Start the state of tokens (B,N,C) of which some are not there, from the first layer's mask.

    Stock masks are (B,N), or (B,1,N,N) with equal rows, bool or additive. Padded tokens get size 0: they take part in
    no matching and are no keys after a plan.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"padded images with {type(mask).__name__} masks are not supported: "
            "call model.set_attn_implementation('sdpa') first"
        )
    row = mask if mask.dim() == 2 else mask[:, 0, 0]
    if row.dtype.is_floating_point and mask.dim() == 4:
        row = row > torch.finfo(row.dtype).min / 2
    valid = row.to(torch.bool).expand(x.shape[0], -1)
    entry = entry_of(x)
    set_state(x, State(x.shape[1], valid.float(), valid, grid=None if entry is None else entry.grid))


class ReducedViTLayer(_Layer, vit.ViTLayer):
    norms = ("layernorm_before", "layernorm_after")

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.dropout(out) + x

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class _ClipLayer(_Layer):
    norms = ("layer_norm1", "layer_norm2")
    attention_name = "self_attn"
    all_keywords = True


class ReducedCLIPLayer(_ClipLayer, clip.CLIPEncoderLayer):
    pass


class ReducedSiglipLayer(_ClipLayer, siglip.SiglipEncoderLayer):
    pass


class ReducedSiglip2Layer(_ClipLayer, siglip2.Siglip2EncoderLayer):
    pass


class ReducedIdefics3Layer(_ClipLayer, idefics3.Idefics3EncoderLayer):
    pass


class ReducedSmolVLMLayer(_ClipLayer, smolvlm.SmolVLMEncoderLayer):
    pass


class ReducedInternVLLayer(_Layer, internvl.InternVLVisionLayer):
    """Branches with layer scale; queries and keys may be normalised over all heads together."""

    norms = ("layernorm_before", "layernorm_after")

    def _projections(self, core: Any, old: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return lambda y: core.q_norm(core.q_proj(y)), lambda y: core.k_norm(core.k_proj(y))

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.lambda_1 * out + x

    def _feed_forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.mlp(self.layernorm_after(x)))
        return (out if self.lambda_2 is None else self.lambda_2 * out) + x


class _DinoLayer(_Layer):
    """Branches with layer scale and stochastic depth."""

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale1(out)) + x  # type: ignore[attr-defined]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(x)))) + x  # type: ignore[attr-defined]


class ReducedDinov2Layer(_DinoLayer, dinov2.Dinov2Layer):
    by_keyword = True


class ReducedDinov2RegistersLayer(_DinoLayer, dinov2_registers.Dinov2WithRegistersLayer):
    by_keyword = True


class ReducedDINOv3Layer(_DinoLayer, dinov3.DINOv3ViTLayer):  # type: ignore[misc]
    """Every remaining token keeps the rotary angles of its representative."""

    def _context(self, context: Any, state: State) -> Any:
        context = super()._context(context, state)
        if state.origin is None:
            return context
        prefix = self._tokenreduce_site.prefix
        rows = state.origin[:, prefix:] - prefix
        tables = tuple(t[rows].unsqueeze(1) for t in context.kwargs["position_embeddings"])  # (B,1,K,d)
        return context._replace(kwargs={**context.kwargs, "position_embeddings": tables})

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        if _SEEN.isdisjoint(needs):
            return super()._attention(x, bias, needs, context)
        cos, sin = context.kwargs["position_embeddings"]
        turn = (dinov3.apply_rotary_pos_emb, cos, sin)
        call = Call(context.mask if context.plain else bias, bias=not context.plain, record=True, rotate=turn)
        empty = {**context.kwargs, "position_embeddings": (cos[..., :0, :], sin[..., :0, :])}
        out = self._call(x, call, empty)
        return Attended(out, call.queries, call.keys, call.values, call.rotated)

    def _rotate(self, q: Tensor, k: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return dinov3.apply_rotary_pos_emb(q, k, *context.kwargs["position_embeddings"])
