"""Which denoisers of diffusers are served, where their transformer blocks are, and why others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from tokenreduce.core.mixing import parts

__all__ = ["FAMILIES", "Denoiser", "Place", "denoisers", "refusal", "stock_class", "towers"]

SERVED = (UNet2DConditionModel, ControlNetModel)
FAMILIES = ("UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL, inpainting, ...)", "ControlNetModel")


@dataclass(frozen=True)
class Place:
    """A spatial transformer of a denoiser, and the size of its feature map: the latent's over ``downsample``."""

    name: str  # path inside the denoiser
    transformer: nn.Module
    downsample: int

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.transformer.transformer_blocks)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Denoiser:
    """One denoiser found inside a model."""

    name: str  # path inside the patched model, "" for the model itself
    module: nn.Module
    family: str
    places: tuple[Place, ...]

    def levels(self) -> dict[int, int]:
        """Number of transformer blocks by the downsampling of their feature maps."""
        found: dict[int, int] = {}
        for place in self.places:
            found[place.downsample] = found.get(place.downsample, 0) + len(place.blocks)
        return dict(sorted(found.items()))


def towers(model: nn.Module) -> tuple[Any, ...]:
    """A denoiser is no vision transformer."""
    return ()


def denoisers(model: nn.Module) -> tuple[Denoiser, ...]:
    """Every denoiser in ``model`` that is served."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SERVED) and (places := tuple(_places(module))):
            found.append(Denoiser(name, module, type(module).__name__, places))
    return tuple(found)


def _places(unet: Any) -> Iterator[Place]:
    """The spatial transformers in the order in which they run."""
    for block, downsample in _stages(unet):
        for module in block.modules():
            if isinstance(module, Transformer2DModel):
                name = next(name for name, other in unet.named_modules() if other is module)
                yield Place(name, module, downsample)


def _stages(unet: Any) -> Iterator[tuple[nn.Module, int]]:
    """The blocks of a UNet, each with what the sides of its feature map were halved by in front of it."""
    downsample = 1
    for block in unet.down_blocks:
        yield block, downsample
        if getattr(block, "downsamplers", None):
            downsample *= 2
    if unet.mid_block is not None:
        yield unet.mid_block, downsample
    for block in getattr(unet, "up_blocks", ()):
        yield block, downsample
        if getattr(block, "upsamplers", None):
            downsample //= 2


def stock_class(module: nn.Module) -> type:
    """The class of ``module`` without what a patch put in front of it."""
    return parts(type(module))[0]


def refusal(module: nn.Module) -> str | None:
    """Why a model of diffusers is not served, or None where it is none."""
    if not isinstance(module, ModelMixin):
        return None
    name = type(module).__name__
    fits = f"served are {', '.join(kind.__name__ for kind in SERVED)}"
    if isinstance(module, SERVED):
        return f"{name} has no spatial transformer (its blocks attend in another way), so there is nothing to merge for"
    if hasattr(module, "down_blocks"):
        return f"{name} is a denoiser whose blocks are not those of a UNet2DConditionModel; {fits}"
    if any(isinstance(m, BasicTransformerBlock) for m in module.modules()) or "Transformer" in name:
        return (
            f"{name} is a diffusion transformer: its tokens carry positions of their own or share one sequence with "
            f"the text, and methods of the diffusion stage are for the feature maps of a UNet; {fits}"
        )
    return f"{name} of diffusers is no denoiser with transformer blocks; {fits}"
