"""The grid of patches of one forward, noted on the tokens that leave the embeddings of a transformers tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.pixels import Pixels
from tokenreduce.adapters.encoders.state import Entry, note_entry

__all__ = ["note_patches", "note_shapes"]


def note_patches(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, patch: tuple[int, ...]
) -> None:
    """Forward hook on embeddings of pixels (B,C,H,W), or (B,T,C,H,W) of clips; ``patch`` is the size of one token,
    (rows, columns) or (frames, rows, columns) of pixels."""
    pixels: Tensor = args[0] if args else kwargs["pixel_values"]
    sides = pixels.shape[-2:] if len(patch) == 2 else (pixels.shape[1], *pixels.shape[-2:])
    grid = tuple(side // each for side, each in zip(sides, patch, strict=True))
    note_entry(output, Entry(grid, Pixels(pixels, patch)))


def note_shapes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, *, gridded: str = ""
) -> None:
    """Forward hook on SigLIP2's embeddings, which get patches and their (rows, columns) per image.

    The grid is that of all images where they are the same. Other shapes of as many patches are one row each, since
    nothing else holds for all of them. Where a method, ``gridded``, lays tokens out on the grid, raises ``ValueError``
    for images of different shapes, and ``RuntimeError`` in a compiled graph, to which the shapes are data.
    """
    if torch.compiler.is_compiling():
        if gridded:
            raise RuntimeError(
                f"{gridded} lays tokens out on the grid of the image, which SigLIP2 gets as data (spatial_shapes) that "
                "a compiled graph does not know; run the model uncompiled, or choose tome, pitome or evit"
            )
        note_entry(output, Entry())
        return
    found = {tuple(shape) for shape in (args[1] if len(args) > 1 else kwargs["spatial_shapes"]).tolist()}
    n = output.shape[1]
    if len(found) > 1 and gridded:
        shapes = ", ".join(f"{rows}x{cols}" for rows, cols in sorted(found))
        raise ValueError(
            f"{gridded} lays tokens out on the grid of the image, and this batch has images of {shapes} patches; give "
            "images of one shape per batch, or choose tome, pitome or evit"
        )
    if len(found) > 1:
        found = {(1, n)} if all(rows * cols == n for rows, cols in found) else set()
    note_entry(output, Entry(found.pop() if found else None))
