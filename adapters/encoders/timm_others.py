"""Other vision transformers of timm than ``VisionTransformer`` and ``Eva``: BEiT and relative-position ViTs, the towers
of Qwen3-VL, DeepSeek-OCR and Gemma 4, NaFlexViT, and CaiT.

What stands behind their blocks (means, poolings, 2x2 merging) was written for all tokens and gets all of them back:
merged ones as copies, dropped ones as the mean of what is left, so that means count tokens by size. NaFlexViT's
attention pooling gets sizes instead, and CaiT's class attention sees what is left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tokenreduce.adapters.encoders import timm_blocks as blocks
from tokenreduce.adapters.encoders.handing import raw_of
from tokenreduce.adapters.encoders.site import may_reduce
from tokenreduce.adapters.encoders.sizes import note_form
from tokenreduce.adapters.encoders.state import Entry, carry_state, log_size, note_entry, state_of
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.adapters.encoders.timm import EVIDENCE, VIT_BLOCKS
from tokenreduce.adapters.encoders.timm_attention import ATTENTIONS, Listening, listen
from tokenreduce.adapters.encoders.timm_model import ReducedModel
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.mixing import mixed, parts
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach", "refusal", "towers"]


class Kind(NamedTuple):
    """How a tower is served: who reads its tokens (see :mod:`tokenreduce.adapters.encoders.readers`), whether their
    keys are behind RoPE, and which of its methods are ours."""

    hands: str = "inside"
    rope: str | None = None
    model: type | None = None


class Whole(nn.Module):
    """Mixin of towers whose layers in between cannot be handed out."""

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's, while nothing is reduced. Raises ``ValueError`` otherwise."""
        me: Any = self
        if may_reduce(me.blocks):
            raise ValueError(f"forward_intermediates of a patched {type(self).__name__}: call tr.unpatch first")
        return super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]


class NaFlexModel(Whole):
    """Mixin of NaFlexViT: attention pooling weighs tokens by their sizes."""

    def _pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
        model: Any = self
        left = raw_of(x)
        state = state_of(left)
        if model.attn_pool is None or left is x or state is None or state.size is None:
            return super()._pool(x, pool_type, patch_valid)  # type: ignore[misc]
        skip = 0 if model.pool_include_prefix else model.num_prefix_tokens
        refuse_own(model.attn_pool)
        return model.attn_pool(left[:, skip:], attn_mask=log_size(state, skip, left.dtype)[:, None, None, :])


#: Tower classes by name.
TOWERS: dict[str, Kind] = {
    "Beit": Kind(model=ReducedModel),
    "VisionTransformerRelPos": Kind(model=ReducedModel),
    "Qwen3VitEncoder": Kind(rope="pre", model=ReducedModel),
    "DeepseekVitEncoder": Kind(rope="pre", model=ReducedModel),
    "Gemma4VitEncoder": Kind(rope="post", model=Whole),
    "NaFlexVit": Kind("all", rope="pre", model=NaFlexModel),
    "Cait": Kind("own", model=Whole),
}
#: Block classes, by module and name, and the mixin that reduces them.
BLOCKS: dict[str, type] = {
    "beit.Block": blocks.BeitBlock,
    "vision_transformer_relpos.RelPosBlock": blocks.RelPosBlock,
    "vision_transformer_relpos.ResPostRelPosBlock": blocks.PostNormedRelPosBlock,
    "eva.EvaBlock": blocks.RopedBlock,
    "deepseek_vit.DeepseekVitBlock": blocks.RopedBlock,
    "gemma4_vit.Gemma4Block": blocks.Gemma4Block,
    "cait.LayerScaleBlock": blocks.CaitBlock,
}
#: Attention classes that take questions by a mixin of their own.
LISTENING: dict[str, type] = {
    "beit.Attention": Listening,
    "vision_transformer_relpos.RelPosAttention": Listening,
    "gemma4_vit.Gemma4Attention": blocks.ListeningGemma4,
    "cait.TalkingHeadAttn": blocks.ListeningTalkingHeads,
}
#: CaiT mixes its heads before and behind the softmax, so that no map of attention is one of queries and keys.
_MIXED = ("keys", "queries", "values", "before")
_WINDOWS = "its blocks attend in windows of a map of rows and columns, so single tokens cannot go; choose a plain ViT"
_STAGES = "a hierarchical model lays its tokens out on a grid between stages, so single tokens cannot go"
#: Models that cannot be reduced, and why.
REFUSED = {
    "VisionTransformerSAM": _WINDOWS,
    "Xcit": "its blocks attend over channels and convolve over the grid of patches, so single tokens cannot go",
    "CrossVit": "its two branches exchange class tokens between blocks of two grids",
    "TNT": "its blocks attend over pixels inside every patch of the full grid, so single tokens cannot go",
    "MlpMixer": "its blocks mix a fixed number of places, so single tokens cannot go",
    "VOLO": _STAGES,
    "ConVit": "its attention is gated by the places of all patches of the grid, so single tokens cannot go",
}


def _named(kind: type) -> str:
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def _of(module: nn.Module, table: Any) -> Any:
    """What ``table`` says of a module's class, or of the class of timm that a user's own is made of."""
    names = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("timm.models."))
    return next((table[n] for n in names if n in table), None)


def towers(model: nn.Module) -> Iterator[Tower]:
    """timm towers of these classes inside ``model``, outermost first."""
    for name, module in model.named_modules():
        kind: Kind | None = _of(module, TOWERS)
        if kind is None:
            continue
        tower: Any = module
        naflex = kind.model is NaFlexModel
        inside = tuple(tower.blocks)
        classes: dict[type, type] = {**VIT_BLOCKS, Block: blocks.NaFlexBlock, EvaBlock: blocks.NaFlexEvaBlock}
        if not naflex:
            found = {k for b in inside if _named(k := parts(type(b))[0]) in BLOCKS}
            classes = {block: mixed(block, BLOCKS[_named(block)]) for block in found}
        late = _named(type(inside[0])) == "cait.LayerScaleBlock"  # its class token comes behind these blocks
        prefix = 0 if late else tower.num_prefix_tokens
        holder = tower.embeds if naflex else tower
        cls = prefix > 0 and getattr(holder, "cls_token", None) is not None
        grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
        rope = kind.rope if not naflex or tower.rope is not None else None
        yield Tower(
            name, module, f"timm {type(module).__name__}", inside, classes, prefix, cls, grid,
            _MIXED if late else EVIDENCE, rope, False, kind.hands,
        )  # fmt: skip


def refusal(module: nn.Module) -> str | None:
    """Why a model of timm cannot be reduced, None where nothing is known of it."""
    if not type(module).__module__.startswith("timm.models."):
        return None
    name = type(module).__name__
    why = _of(module, REFUSED)
    info = getattr(module, "feature_info", None)
    rates = {f["reduction"] for f in getattr(info, "info", info or ()) if isinstance(f, dict) and "reduction" in f}
    if why is None and len(rates) > 1:
        why = _STAGES
    return None if why is None else f"{name} is not supported: {why}"


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into such a tower.

    Raises ``TypeError`` for block, attention or pooling classes that are not known, ``ValueError`` where methods of
    them were replaced.
    """
    model: Any = tower.module
    kind: Kind = _of(model, TOWERS)
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            raise ValueError(f"{tower.family} cannot be resized here; give the model smaller images instead")
    pooling = getattr(model, "attn_pool", None)
    if pooling is not None and type(pooling).__name__ != "AttentionPoolLatent":
        raise TypeError(f"{tower.family}: {type(pooling).__name__} cannot weigh merged tokens; AttentionPoolLatent can")
    attach_tower(tower, reducers, undo)
    for block in tower.blocks:
        branches: Any = getattr(block, "attns", (block,))
        for branch in branches:
            refuse_own(branch)
            if hasattr(branch, "attn"):
                _listen(branch.attn, tower.family, undo)
    refuse_own(model, "forward_intermediates")
    if kind.model is not None:
        undo.mix_in(model, kind.model)
    _note_grids(tower, undo)
    for norm in (getattr(model, "norm_pre", None), getattr(model, "norm", None)):
        if norm is not None:
            undo.hook(norm, carry_state)
    if kind.hands == "own":
        _attend_to_left(model, undo)


def _attend_to_left(model: Any, undo: Undo) -> None:
    """Let CaiT's class attention weigh tokens. Raises ``ValueError`` where a mean stands in its place."""
    if model.global_pool == "avg" or model.blocks_token_only is None:
        raise ValueError("CaiT is supported with its class attention (global_pool='token'), not with a mean of patches")
    for block in model.blocks_token_only:
        refuse_own(block)
        refuse_own(block.attn)
        undo.mix_in(block, blocks.WeighedClassBlock)


def _listen(attn: nn.Module, family: str, undo: Undo) -> None:
    mixin = None if type(attn) in ATTENTIONS else LISTENING.get(_named(type(attn)))
    if mixin is None:
        listen(attn, family, undo)
        return
    refuse_own(attn)
    refuse_patched(type(attn))
    undo.mix_in(attn, mixin)
    note_form(attn, undo)


# -- the grid of a forward ---------------------------------------------------------------------------------------------
def _note_grids(tower: Tower, undo: Undo) -> None:
    model: Any = tower.module
    if hasattr(model, "embeds"):
        undo.hook(model.embeds, note_embeds)
    elif isinstance(model, ReducedModel) and hasattr(model, "_pos_embed"):
        pass  # noted there
    elif tower.grid is not None:  # of strict image size
        undo.pre_hook(tower.blocks[0], functools.partial(note_fixed, grid=tower.grid))
    else:
        undo.hook(model.patch_embed, note_patches, with_kwargs=True)


def note_fixed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, grid: tuple[int, ...]) -> None:
    """Pre-hook on the first block of a model that takes images of one size."""
    note_entry(args[0], Entry(grid))


def note_embeds(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    """Forward hook on NaFlexViT's embeddings, which say the grid of images of one size."""
    grid = output[1]
    note_entry(output[0], Entry(None if grid is None else tuple(grid)))


def note_patches(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
    """Forward hook on Gemma 4's patch embedding, which gets images, or patches with their places."""
    image = args[0] if args else kwargs["x"]
    given = [a for a in (*args[1:], *kwargs.values()) if a is not None and a is not image]
    grid = None
    if isinstance(image, Tensor) and image.dim() == 4 and not given:
        grid = tuple(side // each for side, each in zip(image.shape[-2:], module.patch_size, strict=True))
    note_entry(output[0], Entry(grid))
