"""The denoiser of a pipeline, for users who have the pipeline in hand."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

__all__ = ["module_of"]


def module_of(model: Any) -> nn.Module | None:
    """What is patched of a pipeline: its UNet; None where ``model`` is no pipeline.

    Raises ``TypeError`` for a pipeline without a UNet.
    """
    if not isinstance(model, DiffusionPipeline):
        return None
    parts: dict[str, Any] = model.components  # type: ignore[attr-defined]  # a property that stubs do not know
    unet = parts.get("unet")
    if isinstance(unet, nn.Module):
        return unet
    has = ", ".join(f"{name} ({type(m).__name__})" for name, m in parts.items() if isinstance(m, nn.Module))
    raise TypeError(
        f"{type(model).__name__} has no UNet, whose feature maps methods of the diffusion stage merge; it has {has}. "
        "Of its other parts, patch the module itself where an adapter knows it"
    )
