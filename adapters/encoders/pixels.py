"""Methods at the input that look at pixels: what towers show them, and which tokens enter the first block.

The plan is made from the pixels that a tower is given, and applied in front of its first block, to patches that have
their positions: those that are left stand where they were. From there on they are what any plan leaves
(:mod:`tokenreduce.adapters.encoders.state`): rotary tables, poolings, dense outputs and language models behind know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.adapters.encoders.state import FRAMES, State, entry_of
from tokenreduce.algorithms.pixels import behind
from tokenreduce.core.compiled import settled
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.readable import readable
from tokenreduce.core.reducer import Reducer

__all__ = ["AtEntry", "Pixels", "at_entry", "deviations_of", "entry_plan"]

_CLIP = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.229, 0.224, 0.225)
#: By what the processors of transformers' families divide channels, by the beginning of the tower's class name.
_DEVIATIONS: dict[str, tuple[float, ...]] = {
    "CLIP": _CLIP, "Qwen2": _CLIP, "MetaClip2": _CLIP, "MLCD": _CLIP, "AltCLIP": _CLIP, "ChineseCLIP": _CLIP,
    "Aimv2": _CLIP, "OwlViT": _CLIP, "Owlv2": _CLIP, "Blip": _CLIP, "Blip2": _CLIP, "InstructBlip": _CLIP,
    "Dinov2": _IMAGENET, "DINOv3": _IMAGENET, "InternVL": _IMAGENET, "VideoMAE": _IMAGENET, "VJEPA2": _IMAGENET,
    "ViTMSN": _IMAGENET, "ViTMAE": _IMAGENET, "DeiT": _IMAGENET, "Eomt": _IMAGENET,
    "ViTModel": (0.5,), "Siglip": (0.5,), "Qwen3": (0.5,), "Idefics3": (0.5,), "SmolVLM": (0.5,), "Vivit": (0.5,),
    "Beit": (0.5,), "Data2Vec": (0.5,),
}  # fmt: skip


@dataclass(frozen=True)
class AtEntry:
    """A method on pixels at the input of one tower: ``scale`` turns what the tower is given into 8-bit levels, one
    number or one for each channel; a unit is ``cell`` x ``cell`` patches."""

    reducer: Reducer
    scale: tuple[float, ...]
    cell: int = 1


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the patches of a forward are cut from: ``image`` (B,C,H,W) or (B,T,C,H,W), and the size of a patch, (rows,
    columns) or (frames, rows, columns) of pixels."""

    image: Tensor = field(repr=False)
    patch: tuple[int, ...]

    def units(self, grid: tuple[int, ...], scale: tuple[float, ...], cell: int = 1) -> Tensor:
        """(B,N,P) float32 levels of the units of ``cell`` x ``cell`` patches, in raster order; ``grid`` is that of the
        patches. What no patch fits in is left out; where a model pads, it is 0. Raises ``ValueError`` for a ``scale``
        of another number of channels."""
        image = self.image if self.image.dim() == 5 else self.image.unsqueeze(1)
        deep, (high, wide) = (self.patch[0], self.patch[1:]) if len(self.patch) == 3 else (1, self.patch)
        rows, cols = grid[-2:]
        frames = image.shape[1] // deep
        image = image[:, : frames * deep, :, : rows * high, : cols * wide]
        over = rows * high - image.shape[-2], cols * wide - image.shape[-1]
        image = F.pad(image, (0, over[1], 0, over[0])) if any(over) else image
        channels = image.shape[2]
        if len(scale) not in (1, channels):
            raise ValueError(f"pixels have {channels} channels, and std has {len(scale)}; give std one for each")
        cut = image.unflatten(-1, (cols // cell, cell * wide)).unflatten(-3, (rows // cell, cell * high))
        cut = cut.unflatten(1, (frames, deep)).permute(0, 1, 4, 6, 2, 3, 5, 7)  # (B,t,h,w,deep,C,high,wide)
        return levels(cut, scale).flatten(4).flatten(1, 3)


def levels(pixels: Tensor, scale: tuple[float, ...]) -> Tensor:
    """``pixels`` (...,C,high,wide) in 8-bit levels less a constant of the channel: contiguous, float32."""
    if not readable(pixels):  # nothing is written into under vmap or tracing
        return (pixels.detach().float() * torch.tensor(scale, device=pixels.device).view(-1, 1, 1)).contiguous()
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device).copy_(pixels.detach())
    return out if scale == (1.0,) else out.mul_(torch.tensor(scale, device=pixels.device).view(-1, 1, 1))


# -- at tr.patch -------------------------------------------------------------------------------------------------------
def at_entry(
    reducers: tuple[Reducer, ...], deviations: tuple[float, ...] | None, family: str, cell: int = 1
) -> AtEntry | None:
    """The method on pixels among ``reducers`` at the input of a tower of ``family`` whose processor divides by
    ``deviations``, None where nobody says.

    Raises ``ValueError`` for what cannot be beside it, and where levels are asked for and nothing says what they are.
    """
    mine = next((r for r in reducers if r.drops_at_input), None)
    if mine is None:
        return None
    for other in reducers:
        if other is not mine and other.acting_position() == "input":
            raise ValueError(f"{mine.spec()} and {other.spec()} both act on the input; choose one")
        if getattr(other, "frames", 1) > 1:
            raise ValueError(
                f"{mine.spec()} leaves unequal numbers of patches of every frame, and {other.spec()} takes whole ones "
                f"together; leave frames out"
            )
    method: Any = mine
    std = method.deviations() or deviations
    if std is None and method.tolerance:
        raise ValueError(
            f"{mine.spec()}: tolerance is in 8-bit levels, and nothing says by what pixels are divided for {family}; "
            f"give std, the deviation in the processor's configuration (0.5, or one for each channel)"
        )
    return AtEntry(mine, tuple(255.0 * s for s in std or (1 / 255,)), cell)


def deviations_of(model: nn.Module, tower: nn.Module) -> tuple[float, ...] | None:
    """By what the channels of an image are divided in front of ``tower`` inside ``model``: what timm and open_clip say
    (an attribute ``image_std`` elsewhere), what the processor that was saved or cached with a loaded model says, or
    what a loaded model's family is published with; None where nothing is known."""
    for holder in (tower, model):
        said = getattr(holder, "pretrained_cfg", None) or getattr(holder, "preprocess_cfg", None)
        std = said.get("std") if isinstance(said, dict) else getattr(holder, "image_std", None)
        if std is not None:
            return _numbers(std)
    name = type(tower).__name__
    source = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not source or not type(tower).__module__.startswith("transformers."):
        return None
    found = _configured(source)
    if found is not None:
        return found
    known = [k for k in _DEVIATIONS if name.startswith(k)]
    return _DEVIATIONS[max(known, key=len)] if known else None


def _numbers(std: Any) -> tuple[float, ...]:
    return (float(std),) if isinstance(std, int | float) else tuple(float(s) for s in std)


def _configured(source: str) -> tuple[float, ...] | None:
    """``image_std`` of the processor in a folder, or of a Hub id in the cache."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(
            source, name, local_files_only=True, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is None:
            continue
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        said = said.get("image_processor", said)
        if said.get("do_normalize") is False:
            return (1.0 if said.get("do_rescale", True) else 1 / 255,)
        if said.get("image_std") is not None:
            return _numbers(said["image_std"])
    return None


# -- in a forward ------------------------------------------------------------------------------------------------------
def entry_plan(entry: AtEntry, x: Tensor, state: State, prefix: int, depth: int) -> Plan:
    """The plan for tokens ``x`` (B,N,C) before the first block. Raises ``RuntimeError`` where their pixels are gone."""
    mark, grid, reducer = entry_of(x), state.full_grid(prefix), settled(entry.reducer)
    if mark is None or mark.pixels is None or grid is None:
        raise RuntimeError(
            f"{reducer.spec()} looks at the pixels of every patch, and the tokens before the first block are not those "
            f"of an image's patches: something between embedding and blocks makes new tensors or drops patches"
        )
    units = mark.pixels.units(grid, entry.scale, entry.cell)
    cells = (*grid[:-2], grid[-2] // entry.cell, grid[-1] // entry.cell)
    there = None if state.valid is None else state.valid[:, prefix:]
    frames = FRAMES.get() if getattr(reducer, "temporal", False) and len(grid) == 2 else 1
    if frames > 1:
        units, cells = units.unflatten(0, (-1, frames)).flatten(1, 2), (frames, *cells)
        there = None if there is None else there.unflatten(0, (-1, frames)).flatten(1, 2)
    seen = None if there is None else _of_cells(there, cells, entry.cell)
    shown = EncoderEvidence(units, valid=seen, grid=cells, depth=depth)
    with torch.no_grad():
        plan = reducer.plan(shown)
    if plan.is_identity:
        return Identity.like(x)
    if not isinstance(plan, Prune):
        raise TypeError(f"{reducer.name} acts on pixels, so its plan is a Prune, not a {type(plan).__name__}")
    if frames > 1 or entry.cell > 1:
        stay = plan.places().reshape(len(x), *cells[len(cells) - len(grid) :])
        for side in (-2, -1):
            stay = stay.repeat_interleave(entry.cell, side)
        plan = Prune.from_mask(stay.flatten(1))
    return behind(plan, prefix)


def _of_cells(there: Tensor, cells: tuple[int, ...], cell: int) -> Tensor:
    """(B,N) bool: units with a patch that is ``there`` (B,patches)."""
    if cell == 1:
        return there
    rows, cols = cells[-2:]
    cut = there.reshape(len(there), -1, rows, cell, cols, cell)
    return cut.any(3).any(-1).flatten(1)
