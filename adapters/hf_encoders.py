"""transformers vision encoders: ViT, CLIP, SigLIP, SigLIP2, DINOv2 (also with registers) and DINOv3.

Layers are swapped, attention modules stay: queries and keys come from a registered attention function
(:mod:`tokenreduce.adapters.hf_attention`), which ends in the model's own kernel. While no plan has acted, a layer gets
exactly its stock arguments. Keys are those before RoPE (DINOv3): a recording layer's attention module gets empty
rotary tables and the attention function rotates.

Pooling that lives outside of the tower (classifiers that average tokens) and dense outputs (backbones, masked image
modelling) are served through the tower's output: see :func:`regroup` and :func:`dense_states`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.vit import modeling_vit as vit

from tokenreduce.adapters.encoder import (
    Attended,
    Reduced,
    Site,
    State,
    Tower,
    attach_tower,
    carry_state,
    expand_patches,
    log_size,
    pool_mean,
    set_state,
    state_of,
)
from tokenreduce.adapters.hf_attention import CALL, Call, listen
from tokenreduce.patching import Undo
from tokenreduce.reducer import Reducer

__all__ = ["attach", "towers"]

EVIDENCE = ("keys", "queries", "values", "attention", "before")
#: Evidence that only an attention call can give.
_SEEN = frozenset(("keys", "queries", "values", "attention"))
_WISH = "_tokenreduce_wish"


# -- layers ------------------------------------------------------------------------------------------------------------
class Context(NamedTuple):
    """What a layer was called with besides its tokens; ``plain`` while no plan has acted on them."""

    mask: Any
    kwargs: dict[str, Any]
    plain: bool = True


def _heads(x: Tensor, projection: nn.Module, width: int) -> Tensor:
    """(B,N,C) to (B,H,N,d)."""
    return projection(x).view(*x.shape[:-1], -1, width).transpose(1, 2)


class _Layer(Reduced):
    """Layers called with ``(hidden_states, attention_mask, **kwargs)``; subclasses name their parts."""

    _tokenreduce_site: Site
    norms: tuple[str, str] = ("norm1", "norm2")
    attention_name: str = "attention"
    out: str = "o_proj"
    #: Attention modules that drop or reserve ``attention_mask`` in some versions carry the call by keyword.
    by_keyword: bool = False

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        if self._tokenreduce_site.layer == 0 and attention_mask is not None:
            _note_padding(hidden_states, attention_mask)
        return self._run(hidden_states, Context(attention_mask, kwargs))

    def _context(self, context: Any, state: State) -> Any:
        return context if not state.plans else context._replace(plain=False)

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
        attn, y = getattr(self, self.attention_name), self._normed(x)
        if not self.by_keyword:
            got = attn(y, attention_mask=mask, **kwargs)
        else:
            name = CALL if isinstance(mask, Call) else "attention_mask"
            got = attn(y, **({} if mask is None else {name: mask}), **kwargs)
        return got[0] if isinstance(got, tuple) else got

    def _project(self, x: Tensor, context: Any) -> Attended:
        attn, core = self._core()
        y, width = self._normed(x), _width(core)
        old = core is not attn
        q = _heads(y, core.query if old else core.q_proj, width)
        k = _heads(y, core.key if old else core.k_proj, width)
        reducer = self._tokenreduce_site.reducer
        needs = () if reducer is None else reducer.gathers()
        v = _heads(y, core.value if old else core.v_proj, width) if "values" in needs else None
        return Attended(x, q, k, v, self._rotate(q, k, context))

    def _rotate(self, q: Tensor, k: Tensor, context: Any) -> tuple[Tensor, Tensor] | None:
        return None

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        attn, core = self._core()
        old = core is not attn
        y = self._normed(x)
        v = _heads(y, core.value if old else core.v_proj, _width(core))
        attention = F.dropout(attention.to(v.dtype), p=_dropout(core), training=self.training)  # type: ignore[attr-defined]
        heads = (attention @ v).transpose(1, 2).flatten(2)
        return Attended(attn.output(heads, y) if old else getattr(attn, self.out)(heads), values=v)

    # -- the rest: plain residual branches (CLIP, SigLIP)
    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return x + out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(getattr(self, self.norms[1])(x))  # type: ignore[attr-defined]


def _width(attn: Any) -> int:
    return attn.head_dim if hasattr(attn, "head_dim") else attn.attention_head_size


def _dropout(attn: Any) -> float:
    return next(getattr(attn, n) for n in ("attention_dropout", "dropout_prob", "dropout") if hasattr(attn, n))


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
    set_state(x, State(x.shape[1], valid.float(), valid))


class ReducedViTLayer(_Layer, vit.ViTLayer):
    norms = ("layernorm_before", "layernorm_after")

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.dropout(out) + x

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class _ClipLayer(_Layer):
    norms = ("layer_norm1", "layer_norm2")
    attention_name = "self_attn"
    out = "out_proj"


class ReducedCLIPLayer(_ClipLayer, clip.CLIPEncoderLayer):
    pass


class ReducedSiglipLayer(_ClipLayer, siglip.SiglipEncoderLayer):
    pass


class ReducedSiglip2Layer(_ClipLayer, siglip2.Siglip2EncoderLayer):
    pass


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


# -- heads and dense outputs -------------------------------------------------------------------------------------------
def _reduced(x: Any) -> State | None:
    """The state of tokens on which a plan has acted, else None."""
    state = state_of(x)
    return state if state is not None and state.plans else None


def forget_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on an attention pooling head: SigLIP2 hands it the mask of the original tokens."""
    return None if _reduced(args[0]) is None else (args[:1], {})


def weigh_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on the ``nn.MultiheadAttention`` inside such a head: log sizes as key bias, -inf where no token is."""
    state = _reduced(args[1])
    if state is None or state.size is None:
        return None
    return args, {**kwargs, "key_padding_mask": log_size(state, 0, args[1].dtype)}


def wish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on a model around a tower: marks its pixels, so that the tower's output is made for this model.

    The mark is on a view of the caller's tensor, and a direct call of the tower carries none.
    """
    given = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(given, Tensor):
        return None
    pixels = given.view_as(given)
    setattr(pixels, _WISH, True)
    return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})


def check_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on a tower: pixels become its first positional argument, masks per query are refused."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise ValueError(
            f"a patched model takes an attention_mask of shape (batch, tokens), not {tuple(mask.shape)}: "
            "token counts change; call tr.unpatch first"
        )
    if args or "pixel_values" not in kwargs:
        return None
    rest = dict(kwargs)
    return (rest.pop("pixel_values"),), rest


def regroup(module: nn.Module, args: tuple[Any, ...], output: Any, *, how: str, prefix: int) -> Any:
    """Forward hook on a tower whose model averages its tokens (``how="mean"``) or makes a picture of them ("dense").

    ``last_hidden_state`` is given its original number of tokens back. For a mean every patch holds the mean over the
    tokens that are left, each counted by its size: whatever mean the model takes, with or without a mask, is that
    one. For dense outputs merged tokens are copied and dropped ones are zero.
    """
    if not getattr(args[0], _WISH, False):
        return None
    x = output.last_hidden_state
    state = _reduced(x)
    if state is None:
        return None
    patches = x[:, prefix:]
    if how == "dense":
        patches = expand_patches(patches, state, prefix)
    else:
        mean = patches.mean(1) if state.size is None else pool_mean(patches, state.size[:, prefix:])
        patches = mean.unsqueeze(1).expand(-1, state.entry - prefix, -1)
    output.last_hidden_state = torch.cat([x[:, :prefix], patches], 1)
    return output


def _dense(x: Tensor, state: State | None, prefix: int) -> Tensor:
    if state is None:
        return x
    return torch.cat([x[:, :prefix], expand_patches(x[:, prefix:], state, prefix)], 1)


def dense_states(module: nn.Module, args: tuple[Any, ...], output: Any, *, prefix: int, normed: str) -> Any:
    """Forward hook on a backbone's encoder: its hidden states get all tokens back, zero where dropped.

    Those that the backbone sends through its final norm (``normed``: "all", "last" or "none") are expanded behind
    it, by :func:`dense_norm`, so that dropped tokens are zero in every feature map.
    """
    states = output.hidden_states
    if states is None or normed == "all":
        return None
    last = len(states) - 1
    output.hidden_states = tuple(
        h if h is None or (i == last and normed == "last") else _dense(h, _reduced(h), prefix)
        for i, h in enumerate(states)
    )
    return output


def dense_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, prefix: int) -> Tensor:
    """Forward hook on a backbone's final norm; see :func:`dense_states`."""
    return _dense(output, _reduced(args[0]), prefix)


# -- resizing the input ------------------------------------------------------------------------------------------------
def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _target(pixels: Tensor, reducer: Any, patch: tuple[int, int]) -> tuple[int, int]:
    rows, cols = reducer.grid(tuple(s // p for s, p in zip(pixels.shape[-2:], patch, strict=True)))
    return rows * patch[0], cols * patch[1]


def resized_input(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    reducer: Any,
    patch: tuple[int, int],
    flag: bool,
) -> Any:
    """Pre-hook on the embeddings: shrink the image (bicubic, antialiased) to the reducer's share of patches."""
    pixels = args[0]
    size = _target(pixels, reducer, patch)
    if size == tuple(pixels.shape[-2:]):
        return None
    if kwargs.get("bool_masked_pos") is not None:
        raise ValueError("resize changes the number of patches, so bool_masked_pos cannot be used with it")
    # Antialiased resampling has no half precision kernel on the CPU.
    image = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return (image.to(pixels.dtype), *args[1:]), {**kwargs, **({"interpolate_pos_encoding": True} if flag else {})}


def resized_rope(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, reducer: Any, patch: tuple[int, int]
) -> Any:
    """Pre-hook on DINOv3's rotary embedding, which reads only the shape of the pixels."""
    size = _target(args[0], reducer, patch)
    return (args[0][..., :1, :1].expand(*args[0].shape[:2], *size), *args[1:]), kwargs


# -- finding and attaching ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """Where a tower class keeps its parts."""

    title: str
    layers: str  # path of the layer list
    norm: str | None  # final norm that all tokens pass
    layer: type
    patched: type
    attention: type
    cls: bool = True
    flag: bool = True  # whether the embeddings take interpolate_pos_encoding

    def prefix(self, config: Any) -> int:
        return getattr(config, "num_register_tokens", 0) + 1 if self.cls else 0


_DINO2 = Family("DINOv2", "encoder.layer", "layernorm", dinov2.Dinov2Layer, ReducedDinov2Layer,
                dinov2.Dinov2Attention, flag=False)  # fmt: skip
_DINO2R = Family("DINOv2 with registers", "encoder.layer", "layernorm", dinov2_registers.Dinov2WithRegistersLayer,
                 ReducedDinov2RegistersLayer, dinov2_registers.Dinov2WithRegistersAttention, flag=False)  # fmt: skip
_DINO3 = Family("DINOv3", "model.layer", "norm", dinov3.DINOv3ViTLayer, ReducedDINOv3Layer,
                dinov3.DINOv3ViTAttention, flag=False)  # fmt: skip
FAMILIES: dict[type, Family] = {
    vit.ViTModel: Family("ViT", "layers", "layernorm", vit.ViTLayer, ReducedViTLayer, vit.ViTAttention),
    clip.CLIPVisionModel: Family(
        "CLIP", "encoder.layers", None, clip.CLIPEncoderLayer, ReducedCLIPLayer, clip.CLIPAttention
    ),
    siglip.SiglipVisionModel: Family(
        "SigLIP", "encoder.layers", "post_layernorm", siglip.SiglipEncoderLayer, ReducedSiglipLayer,
        siglip.SiglipAttention, cls=False,
    ),
    siglip2.Siglip2VisionModel: Family(
        "SigLIP2", "encoder.layers", "post_layernorm", siglip2.Siglip2EncoderLayer, ReducedSiglip2Layer,
        siglip2.Siglip2Attention, cls=False,
    ),
    dinov2.Dinov2Model: _DINO2,
    dinov2.Dinov2Backbone: _DINO2,
    dinov2_registers.Dinov2WithRegistersModel: _DINO2R,
    dinov2_registers.Dinov2WithRegistersBackbone: _DINO2R,
    dinov3.DINOv3ViTModel: _DINO3,
    dinov3.DINOv3ViTBackbone: _DINO3,
}  # fmt: skip
BACKBONES = (dinov2.Dinov2Backbone, dinov2_registers.Dinov2WithRegistersBackbone, dinov3.DINOv3ViTBackbone)
#: Models that read all tokens of a tower: the tower's name in them, and what they make of its tokens.
READERS: dict[type, tuple[str, str]] = {
    clip.CLIPForImageClassification: ("vision_model", "mean"),
    siglip.SiglipForImageClassification: ("vision_model", "mean"),
    siglip2.Siglip2ForImageClassification: ("vision_model", "mean"),
    dinov2.Dinov2ForImageClassification: ("dinov2", "mean"),
    dinov2_registers.Dinov2WithRegistersForImageClassification: ("dinov2_with_registers", "mean"),
    vit.ViTForMaskedImageModeling: ("vit", "dense"),
}


@dataclass(frozen=True)
class HFTower(Tower):
    """A tower, and the model around it that averages or draws its tokens, if there is one."""

    layout: Family | None = None
    reader: nn.Module | None = None
    how: str = ""


def towers(model: nn.Module) -> Iterator[Tower]:
    """transformers vision towers inside ``model``, found by class (text towers share their layer classes)."""
    readers: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for kind, (name, how) in READERS.items():
            if isinstance(module, kind):
                readers[id(getattr(module, name))] = (module, how)
    for name, module in model.named_modules():
        family = next((f for kind, f in FAMILIES.items() if isinstance(module, kind)), None)
        if family is None:
            continue
        config: Any = module.config
        grid = None
        if hasattr(config, "image_size"):
            size, patch = _pair(config.image_size), _pair(config.patch_size)
            grid = (size[0] // patch[0], size[1] // patch[1])
        reader, how = readers.get(id(module), (None, ""))
        rope = "pre" if family is _DINO3 else None
        resizes = grid is not None and how != "dense" and not isinstance(module, BACKBONES)
        layers = tuple(module.get_submodule(family.layers).children())
        yield HFTower(
            name, module, f"transformers {family.title}", layers, {family.layer: family.patched},
            family.prefix(config), family.cls, grid, EVIDENCE, rope, resizes, family, reader, how,
        )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a transformers tower.

    Raises ``TypeError`` for layer or attention classes that are not known, ``ValueError`` for ``resize`` in a model
    that cannot take smaller images.
    """
    assert isinstance(tower, HFTower)
    assert tower.layout is not None
    module: Any = tower.module
    layout, prefix = tower.layout, tower.prefix
    attentions = [getattr(layer, layout.patched.attention_name) for layer in tower.blocks]  # type: ignore[attr-defined]
    for attn in attentions:
        if type(attn) is not layout.attention:
            raise TypeError(
                f"{tower.family}: attention class {type(attn).__name__} is not supported; "
                f"supported: {layout.attention.__name__}"
            )
    attach_tower(tower, reducers, undo)
    copies: dict[int, Any] = {}
    for attn in attentions:
        listen(getattr(attn, "attention", attn), undo, copies)
    undo.pre_hook(module, check_inputs)
    if isinstance(module, BACKBONES):
        _attach_backbone(module, layout, prefix, undo)
    elif layout.norm is not None:
        undo.hook(getattr(module, layout.norm), carry_state)
    head = getattr(module, "head", None)
    if head is not None:
        undo.pre_hook(head, forget_mask)
        undo.pre_hook(head.attention, weigh_keys)
    if tower.reader is not None:
        undo.pre_hook(tower.reader, wish)
        undo.hook(module, functools.partial(regroup, how=tower.how, prefix=prefix))
    for reducer in reducers:
        if reducer.site() == "input":
            _attach_resize(tower, layout, reducer, undo)


def _attach_backbone(module: Any, layout: Family, prefix: int, undo: Undo) -> None:
    normed = "all" if module.config.apply_layernorm else "last" if layout is _DINO3 else "none"
    encoder = module.get_submodule(layout.layers.partition(".")[0])
    undo.hook(encoder, functools.partial(dense_states, prefix=prefix, normed=normed))
    undo.hook(module.get_submodule(layout.norm), functools.partial(dense_norm, prefix=prefix))


def _attach_resize(tower: Tower, layout: Family, reducer: Any, undo: Undo) -> None:
    module: Any = tower.module
    if isinstance(module, siglip2.Siglip2VisionModel):
        raise ValueError(
            f"{tower.family} cannot be resized here, its processor cuts images into patches: "
            "give the processor a smaller max_num_patches instead"
        )
    if not tower.resizes:
        raise ValueError(
            f"{tower.family} cannot be resized here: the model lays its patches out on the full grid; "
            "give the model smaller images instead"
        )
    patch = _pair(module.config.patch_size)
    undo.pre_hook(module.embeddings, functools.partial(resized_input, reducer=reducer, patch=patch, flag=layout.flag))
    if layout is _DINO3:
        undo.pre_hook(module.rope_embeddings, functools.partial(resized_rope, reducer=reducer, patch=patch))
