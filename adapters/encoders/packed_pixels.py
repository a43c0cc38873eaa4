"""Methods at the input that look at pixels, in towers whose patches are packed over images and frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.packed import Layout
from tokenreduce.adapters.encoders.pixels import AtEntry, levels
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.host import on_host, values
from tokenreduce.core.plan import Identity, Plan, Prune

__all__ = ["PackedPixels", "packed_plans"]


@dataclass(frozen=True, eq=False)
class PackedPixels:
    """What a call of a packed tower is given: ``rows`` (P,V) pixels of the patches, (channels, frames, rows, columns)
    of each, in the order of the images; ``layout`` says which units are of one image, or of one video where a method
    looks across its frames; ``order`` (N,) is the order in which the tower puts units, None where it leaves them."""

    rows: Tensor = field(repr=False)
    layout: Layout
    order: Tensor | None
    channels: int
    frames: int

    @classmethod
    def of(
        cls, embed: Any, rows: Tensor, grids: list[list[int]], merge: int, order: Tensor | None, temporal: bool
    ) -> PackedPixels:
        """From the ``rows`` that a tower is called with, what ``embed``s them, (frames, rows, columns) of patches of
        every image, and ``merge`` x ``merge`` patches of a unit; ``temporal``: all frames of a video are one row.

        Raises ``ValueError`` for rows that are not the pixels of these patches.
        """
        longest = max((t for t, _, _ in grids), default=1) if temporal else 1
        layout, size = Layout.of(grids, merge, order, rows.device, longest), embed.proj.weight[0].numel()
        if tuple(rows.shape) != (sum(t * h * w for t, h, w in grids), size):
            raise ValueError(
                f"a method looks at pixels, and {tuple(rows.shape)} are not those of the patches of images {grids}, "
                f"with {size} numbers each; give the tower what its processor makes"
            )
        return cls(rows.detach(), layout, order, embed.in_channels, embed.temporal_patch_size)

    def units(self, place: Tensor, scale: tuple[float, ...]) -> Tensor:
        """(G,U,V) float32 levels of the units at ``place`` (G,U). Of an image, which comes as several equal frames, one
        is enough."""
        number = place if self.order is None else self.order.to(place.device)[place]
        pixels = self.rows.shape[1] // self.channels // self.frames
        units = self.rows.view(-1, self.layout.unit, self.channels, self.frames, pixels)
        start, count = int(number[0, 0]) if number.numel() else 0, number.numel()
        here = torch.arange(start, start + count, device=number.device)
        if torch.equal(number.flatten(), here):  # as they lie, which spares a copy of all pixels
            cut = units[start : start + count].unflatten(0, number.shape)
        else:
            cut = units[number]
        first = cut[..., :1, :]
        cut = first if _all_alike(cut, first) else cut
        return levels(cut, scale).flatten(2)


def _all_alike(frames: Tensor, first: Tensor) -> bool:
    """Whether all ``frames`` (...,T,V) are the ``first`` (...,1,V)."""
    if frames.dtype == torch.float32 and on_host(frames):  # numpy compares with strides in a third of the time
        return bool((values(frames[..., 1:, :]) == values(first)).all())
    return bool((frames[..., 1:, :] == first).all())


def packed_plans(entry: AtEntry, pixels: PackedPixels, layout: Layout, depth: int) -> list[Plan]:
    """The plans on the units of ``layout``, one for each size of views, of the method at ``entry``."""
    method, stay = entry.reducer, None
    for shape, place in zip(pixels.layout.shapes, pixels.layout.places, strict=True):
        shown = EncoderEvidence(pixels.units(place, entry.scale), grid=shape, depth=depth)
        with torch.no_grad():
            plan = method.plan(shown)
        if plan.is_identity:
            continue
        if not isinstance(plan, Prune):
            raise TypeError(f"{method.name} acts on pixels, so its plan is a Prune, not a {type(plan).__name__}")
        if stay is None:
            units = sum(p.numel() for p in pixels.layout.places)
            stay = torch.ones(units, dtype=torch.bool, device=place.device)
        stay[place] = plan.places()
    marks = [None if stay is None else stay[place] for place in layout.places]
    return [
        Identity(place.shape[1], len(place), place.device)
        if mark is None or bool(mark.all())
        else Prune.from_mask(mark)
        for mark, place in zip(marks, layout.places, strict=True)
    ]
