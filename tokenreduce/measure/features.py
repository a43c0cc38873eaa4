"""Feature maps of frames from the vision transformers that commands load by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenreduce.measure.picture import patch_size
from tokenreduce.patching import describe

__all__ = ["feature_maps"]


def feature_maps(loaded: Any) -> Callable[[Any], Tensor]:
    """A function from frames (T,H,W,3) uint8 to (T,h,w,C): what the last block of the vision tower gives for patches.

    ``loaded`` comes from :func:`tokenreduce.bench.models.load_model`. Raises ``ValueError`` for a model that has no
    vision tower whose grid is known.
    """
    towers = describe(loaded.model).towers
    if not towers or towers[0].grid is None or len(towers[0].grid) != 2:
        raise ValueError(f"{loaded.name} has no vision tower with a grid of patches; give a plain vision transformer")
    tower = towers[0]
    high, wide = patch_size(tower.module)
    device = next(loaded.model.parameters()).device

    @torch.no_grad()
    def encode(frames: Any) -> Tensor:
        x = torch.stack([loaded.transform(Image.fromarray(frame)) for frame in frames]).to(device)
        rows, columns = x.shape[-2] // high, x.shape[-1] // wide
        seen: list[Tensor] = []

        def keep(block: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = tower.blocks[-1].register_forward_hook(keep)
        try:
            loaded.predict(x)
        finally:
            hook.remove()
        body = seen[0][:, tower.prefix :]
        if body.shape[1] != rows * columns:
            raise ValueError(f"{loaded.name} gives {body.shape[1]} patches, not {rows}x{columns}")
        return body.reshape(len(x), rows, columns, -1)

    return encode
