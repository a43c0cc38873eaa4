"""A method of the diffusion stage put into the transformer blocks of a denoiser."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from tokenreduce.adapters.diffusion.blocks import (
    KWARGS,
    Mapped,
    MergedAttention,
    MergedFeedForward,
    Merging,
    check_processor,
    note_timestep,
)
from tokenreduce.adapters.diffusion.find import BasicTransformerBlock, Denoiser, Place, Transformer2DModel, stock_class
from tokenreduce.adapters.diffusion.site import ON_BLOCK, ON_MODULE, DiffusionSite
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.core.diffusion_reducer import DiffusionReducer
from tokenreduce.core.reducer import Reducer

__all__ = ["attach"]

#: The modules of a block by the names that methods use.
PARTS = {"attn": "attn1", "crossattn": "attn2", "mlp": "ff"}


def attach(denoisers: tuple[Denoiser, ...], reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Put the one method of ``reducers`` into every block where it acts; every change goes through ``undo``.

    Raises ``ValueError`` for methods of other stages, several methods, and a method that acts in no block;
    ``TypeError`` for blocks that are not as diffusers made them.
    """
    reducer = _one(reducers, denoisers[0].family)
    for denoiser in denoisers:
        acting = [place for place in denoiser.places if reducer.acts_on(place.downsample)]
        if not _modules(acting, reducer):
            raise ValueError(_nowhere(denoiser, reducer))
        for place in denoiser.places:
            _check(place, reducer, place in acting)
        _attach(denoiser, reducer, acting, undo)


def _one(reducers: tuple[Reducer, ...], family: str) -> DiffusionReducer:
    for reducer in reducers:
        if not isinstance(reducer, DiffusionReducer):
            raise ValueError(
                f"{reducer.name} acts at stage {reducer.stage}, which is not available on {family} (stages there: "
                "diffusion); tr.list_methods(stage='diffusion') lists what fits"
            )
    if len(reducers) > 1:
        names = " and ".join(r.spec() for r in reducers)
        raise ValueError(f"{names} would both merge in the same blocks; give one method of the diffusion stage")
    assert isinstance(reducers[0], DiffusionReducer)
    return reducers[0]


def _nowhere(denoiser: Denoiser, reducer: DiffusionReducer) -> str:
    if not reducer.modules():
        return f"{reducer.spec()} merges for no module of a block: choose among {', '.join(PARTS)}"
    levels = ", ".join(f"{blocks} at 1/{level}" for level, blocks in denoiser.levels().items())
    return (
        f"{reducer.spec()} acts nowhere in {denoiser.family}, whose transformer blocks are at these parts of the "
        f"latent's size: {levels}; set max_downsample to one of {sorted(denoiser.levels())}, and a module that is there"
    )


def _modules(places: list[Place], reducer: DiffusionReducer) -> list[nn.Module]:
    """The modules that will run on merged tokens."""
    named = [getattr(block, PARTS[name]) for p in places for block in p.blocks for name in reducer.modules()]
    return [module for module in named if module is not None]


def _check(place: Place, reducer: DiffusionReducer, acts: bool) -> None:
    """Raise where something was replaced that merged tokens would go around, or that looks at where tokens are."""
    refuse_own(place.transformer)
    if stock_class(place.transformer) is not Transformer2DModel or not place.transformer.is_input_continuous:
        raise TypeError(f"{place.name} is {type(place.transformer).__name__} on other input than feature maps")
    refuse_patched(Transformer2DModel)
    if not acts:
        return
    for block in place.blocks:
        if stock_class(block) is not BasicTransformerBlock:
            raise TypeError(
                f"{place.name} has blocks of class {type(block).__module__}.{type(block).__name__}, not diffusers' "
                "own; take back what replaced them (another library's patch) before tr.patch"
            )
        refuse_own(block)
        refuse_patched(BasicTransformerBlock)
        for module in filter(None, (block.attn1, block.attn2, block.ff)):
            refuse_own(module)  # type: ignore[arg-type]
        for module in _modules([place], reducer):
            check_processor(module)


def _attach(denoiser: Denoiser, reducer: DiffusionReducer, acting: list[Place], undo: Any) -> None:
    depth = sum(len(place.blocks) for place in denoiser.places)
    names = list(inspect.signature(type(denoiser.module).forward).parameters)[1:]
    undo.pre_hook(denoiser.module, functools.partial(note_timestep, names.index("timestep"), names.index(KWARGS)))
    layer = 0
    for place in denoiser.places:
        acts = place in acting
        undo.set(place.transformer, ON_MODULE, acts)
        undo.mix_in(place.transformer, Mapped)
        for block in place.blocks:
            if acts:
                undo.set(block, ON_BLOCK, DiffusionSite(layer, depth, reducer))
                _merge(block, reducer, undo)
            layer += 1


def _merge(block: Any, reducer: DiffusionReducer, undo: Any) -> None:
    for name, part in PARTS.items():
        module = getattr(block, part)
        if module is None or (part == "ff" and name not in reducer.modules()):
            continue
        undo.set(module, ON_MODULE, name in reducer.modules())
        undo.mix_in(module, MergedFeedForward if part == "ff" else MergedAttention)
    undo.mix_in(block, Merging)
