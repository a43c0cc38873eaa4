"""transformers vision encoders: ViT, CLIP, SigLIP, SigLIP2, DINOv2 (also with registers), DINOv3, the towers of
InternVL, Idefics3 and SmolVLM, and the video encoders VideoMAE and ViViT.

The layers are in :mod:`tokenreduce.adapters.encoders.hf_layers` and :mod:`tokenreduce.adapters.encoders.hf_video`, what
stands behind a
tower is served by the hooks in :mod:`tokenreduce.adapters.encoders.hf_outputs`, and methods that shrink the image by
those in
:mod:`tokenreduce.adapters.encoders.hf_resize`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.internvl import modeling_internvl as internvl
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.smolvlm import modeling_smolvlm as smolvlm
from transformers.models.videomae import modeling_videomae as videomae
from transformers.models.vit import modeling_vit as vit
from transformers.models.vivit import modeling_vivit as vivit

from tokenreduce.adapters.encoders import hf_layers, hf_video
from tokenreduce.adapters.encoders.hf_attention import listen
from tokenreduce.adapters.encoders.hf_entry import note_patches, note_shapes
from tokenreduce.adapters.encoders.hf_found import Found, attach_found, depth_of, is_tower, layer_class, look, odd
from tokenreduce.adapters.encoders.hf_layers import EVIDENCE
from tokenreduce.adapters.encoders.hf_outputs import dense_norm, dense_states, forget_mask, regroup, weigh_keys, wish
from tokenreduce.adapters.encoders.hf_resize import attach_resize, pair
from tokenreduce.adapters.encoders.hf_structure import PLACES, ROTARY, core_of, hear
from tokenreduce.adapters.encoders.readers import own_code
from tokenreduce.adapters.encoders.site import may_reduce
from tokenreduce.adapters.encoders.sizes import note_form
from tokenreduce.adapters.encoders.state import carry_state
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.mixing import mixed, parts
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "towers"]


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
    core: tuple[type, type] | None = None  # attention inside the attention that takes no mask, and its subclass
    found: Found | None = None  # what was found out about a class that is in no table

    def attention_of(self, layer: nn.Module) -> Any:
        named: Any = self.patched
        return getattr(layer, named.attention_name if self.found is None else self.found.recipe.attention)

    def prefix(self, config: Any) -> int:
        return getattr(config, "num_register_tokens", 0) + 1 if self.cls else 0


_DINO2 = Family("DINOv2", "encoder.layer", "layernorm", dinov2.Dinov2Layer, hf_layers.ReducedDinov2Layer,
                dinov2.Dinov2Attention, flag=False)  # fmt: skip
_DINO2R = Family("DINOv2 with registers", "encoder.layer", "layernorm", dinov2_registers.Dinov2WithRegistersLayer,
                 hf_layers.ReducedDinov2RegistersLayer, dinov2_registers.Dinov2WithRegistersAttention,
                 flag=False)  # fmt: skip
_DINO3 = Family("DINOv3", "model.layer", "norm", dinov3.DINOv3ViTLayer, hf_layers.ReducedDINOv3Layer,
                dinov3.DINOv3ViTAttention, flag=False)  # fmt: skip
FAMILIES: dict[type, Family] = {
    vit.ViTModel: Family("ViT", "layers", "layernorm", vit.ViTLayer, hf_layers.ReducedViTLayer, vit.ViTAttention),
    clip.CLIPVisionModel: Family(
        "CLIP", "encoder.layers", None, clip.CLIPEncoderLayer, hf_layers.ReducedCLIPLayer, clip.CLIPAttention
    ),
    siglip.SiglipVisionModel: Family(
        "SigLIP", "encoder.layers", "post_layernorm", siglip.SiglipEncoderLayer, hf_layers.ReducedSiglipLayer,
        siglip.SiglipAttention, cls=False,
    ),
    siglip2.Siglip2VisionModel: Family(
        "SigLIP2", "encoder.layers", "post_layernorm", siglip2.Siglip2EncoderLayer, hf_layers.ReducedSiglip2Layer,
        siglip2.Siglip2Attention, cls=False,
    ),
    internvl.InternVLVisionModel: Family(
        "InternVL vision", "encoder.layer", "layernorm", internvl.InternVLVisionLayer, hf_layers.ReducedInternVLLayer,
        internvl.InternVLVisionAttention, flag=False,
    ),
    idefics3.Idefics3VisionTransformer: Family(
        "Idefics3 vision", "encoder.layers", "post_layernorm", idefics3.Idefics3EncoderLayer,
        hf_layers.ReducedIdefics3Layer, idefics3.Idefics3VisionAttention, cls=False, flag=False,
    ),
    smolvlm.SmolVLMVisionTransformer: Family(
        "SmolVLM vision", "encoder.layers", "post_layernorm", smolvlm.SmolVLMEncoderLayer,
        hf_layers.ReducedSmolVLMLayer, smolvlm.SmolVLMVisionAttention, cls=False, flag=False,
    ),
    videomae.VideoMAEModel: Family(
        "VideoMAE", "encoder.layer", "layernorm", videomae.VideoMAELayer, hf_video.ReducedVideoMAELayer,
        videomae.VideoMAEAttention, cls=False, flag=False,
        core=(videomae.VideoMAESelfAttention, hf_video.ListeningVideoMAESelfAttention),
    ),
    vivit.VivitModel: Family(
        "ViViT", "layers", "layernorm", vivit.VivitLayer, hf_video.ReducedVivitLayer, vivit.VivitAttention, flag=False
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
    videomae.VideoMAEForVideoClassification: ("videomae", "mean"),
    videomae.VideoMAEForPreTraining: ("videomae", "dense"),
}


@dataclass(frozen=True)
class HFTower(Tower):
    """A tower, and the model around it that averages or draws its tokens, if there is one."""

    layout: Family | None = None
    reader: nn.Module | None = None
    how: str = ""


def towers(model: nn.Module) -> Iterator[Tower]:
    """transformers vision towers inside ``model``, found by class (text towers share their layer classes).

    Raises ``TypeError`` for video models that cannot be reduced, with the reason.
    """
    readers: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for kind, (name, how) in READERS.items():
            if isinstance(module, kind):
                readers[id(getattr(module, name))] = (module, how)
    for name, module in model.named_modules():
        if reason := hf_video.REFUSED.get(type(module).__name__):
            raise TypeError(f"{type(module).__name__} is not supported: {reason}")
        family = next((f for kind, f in FAMILIES.items() if isinstance(module, kind)), None)
        if family is None:
            if is_tower(module) and refusal(module) is None:
                yield _discovered(name, module)
            continue
        config: Any = module.config
        grid: tuple[int, ...] | None = None
        if hasattr(config, "image_size"):
            size = pair(config.image_size)
            grid = hf_video.clip_grid(config, size)
            if grid is None:
                patch = pair(config.patch_size)
                grid = (size[0] // patch[0], size[1] // patch[1])
        reader, how = readers.get(id(module), (None, ""))
        drawn = how == "dense"
        if reader is not None and own_code(reader):  # a subclass may read its tokens in another way
            how = ""
        rope = "pre" if family is _DINO3 else None
        # Video encoders have fixed position tables.
        resizes = grid is not None and len(grid) == 2 and not drawn and not isinstance(module, BACKBONES)
        layers = tuple(module.get_submodule(family.layers).children())
        yield HFTower(
            name, module, f"transformers {family.title}", layers, {family.layer: family.patched},
            family.prefix(config), family.cls, grid, _shown(grid), rope, resizes, layout=family, reader=reader, how=how,
        )  # fmt: skip


def _shown(grid: tuple[int, ...] | None) -> tuple[str, ...]:
    """Evidence of a tower: patches that fill no grid are not shown their pixels."""
    return EVIDENCE if grid is None else (*EVIDENCE, "pixels")


def refusal(module: nn.Module) -> str | None:
    """Why a module that is built as a vision transformer cannot be reduced, None where it can, or is none."""
    if not is_tower(module):
        return odd(module)
    try:
        look(module)
    except TypeError as error:
        return str(error)
    return None


def _discovered(name: str, module: Any) -> HFTower:
    """A tower that is in no table."""
    found, kind = look(module), type(module).__name__
    layers = tuple(module.get_submodule(found.path).children())[: depth_of(module)]
    stock = parts(type(layers[0]))[0]
    patched = mixed(stock, layer_class(found.recipe))
    attn = getattr(layers[0], found.recipe.attention)
    family = Family(kind, found.path, None, stock, patched, parts(type(attn))[0], found=found)
    roped = "post" if {ROTARY, PLACES}.intersection(found.recipe.arguments) else None
    return HFTower(
        name, module, f"transformers {kind}", layers, {family.layer: patched}, found.prefix, found.prefix > 0,
        found.grid, _shown(found.grid), roped, found.resizes, "inside" if found.tail == "inside" else "own",
        layout=family,
    )  # fmt: skip


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a transformers tower.

    Raises ``TypeError`` for layer or attention classes that are not known, ``ValueError`` for ``resize`` in a model
    that cannot take smaller images, for a classifier that reads a single patch, or where methods were replaced.
    """
    assert isinstance(tower, HFTower)
    assert tower.layout is not None
    module: Any = tower.module
    layout = tower.layout
    attentions = [layout.attention_of(layer) for layer in tower.blocks]
    _check_attentions(tower, layout, attentions)
    if tower.reader is not None:
        hf_video.check_head(tower.reader)
    attach_tower(tower, reducers, undo)
    _attach_attentions(tower, layout, attentions, undo)
    undo.pre_hook(module, check_inputs)
    if layout.found is not None:
        undo.pre_hook(module, functools.partial(check_biased, biased=layout.found.recipe.biased))
        attach_found(module, tower.blocks, layout.found, undo)
    else:
        _note_grid(tower, reducers, undo)
        _attach_ends(tower, layout, undo)
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            attach_resize(tower, reducer, undo, flag=layout.found is not None or layout.flag)


def _check_attentions(tower: Tower, layout: Family, attentions: list[Any]) -> None:
    for attn in attentions:
        refuse_own(attn)
        refuse_patched(type(attn))
        if type(attn) is not layout.attention:
            raise TypeError(
                f"{tower.family}: attention class {type(attn).__name__} is not supported; "
                f"supported: {layout.attention.__name__}"
            )


def _attach_attentions(tower: Tower, layout: Family, attentions: list[Any], undo: Undo) -> None:
    """Let attention modules tell what they see."""
    copies: dict[int, Any] = {}
    for attn in attentions:
        core: Any = getattr(attn, "attention", attn)
        refuse_own(core)
        if layout.found is not None:
            hear(core_of(attn), undo, copies)
            continue
        listen(core, undo, copies)
        note_form(core, undo)
        if layout.core is not None:
            kind = type(core)
            if kind is not layout.core[0]:
                raise TypeError(
                    f"{tower.family}: attention class {kind.__name__} is not supported; "
                    f"supported: {layout.core[0].__name__}"
                )
            refuse_patched(kind)
            undo.swap_class(core, layout.core[1])


def _attach_ends(tower: HFTower, layout: Family, undo: Undo) -> None:
    """What stands behind the layers of a known tower: norms, heads, and who reads its tokens."""
    module: Any = tower.module
    if isinstance(module, BACKBONES):
        _attach_backbone(module, layout, tower.prefix, undo)
    elif layout.norm is not None and getattr(module, layout.norm) is not None:
        undo.hook(getattr(module, layout.norm), carry_state)
    head = getattr(module, "head", None)
    if head is not None:
        refuse_own(head)
        undo.pre_hook(head, functools.partial(forget_mask, reduces=may_reduce(tower.blocks)))
    if (attention := getattr(head, "attention", None)) is not None:
        refuse_own(attention)
        undo.pre_hook(attention, weigh_keys)
    if tower.reader is not None and tower.how:
        undo.pre_hook(tower.reader, wish)
        undo.hook(module, functools.partial(regroup, how=tower.how, prefix=tower.prefix))


def _note_grid(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Let the tokens of a forward say its own grid of patches, up to the first layer."""
    module: Any = tower.module
    if isinstance(module, siglip2.Siglip2VisionModel):
        gridded = next((r.spec() for r in reducers if r.gridded and may_reduce(tower.blocks)), "")
        undo.hook(module.embeddings, functools.partial(note_shapes, gridded=gridded), with_kwargs=True)
    else:
        note = functools.partial(note_patches, patch=hf_video.token_size(module.config))
        undo.hook(module.embeddings, note, with_kwargs=True)
    if hasattr(module, "pre_layrnorm"):  # CLIP's norm before its layers
        undo.hook(module.pre_layrnorm, carry_state)


def _attach_backbone(module: Any, layout: Family, prefix: int, undo: Undo) -> None:
    normed = "all" if module.config.apply_layernorm else "last" if layout is _DINO3 else "none"
    encoder = module.get_submodule(layout.layers.partition(".")[0])
    undo.hook(encoder, functools.partial(dense_states, prefix=prefix, normed=normed))
    undo.hook(module.get_submodule(layout.norm), functools.partial(dense_norm, prefix=prefix))


def check_biased(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, biased: bool) -> None:
    """Pre-hook on a tower: masks cannot be told from biases by relative position, which travel with them."""
    if biased and kwargs.get("attention_mask") is not None:
        raise ValueError("a patched model with relative positions takes no attention_mask; call tr.unpatch first")


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
