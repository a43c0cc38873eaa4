"""The visual tokens of images by themselves, for engines that run the language model in code of their own.

Such an engine (vLLM) calls ``get_image_features`` of the library's model and lays the features into a prompt that it
made before, of as many placeholders as it was told. :func:`watch_features` lets these calls tell what the tower saw,
and :func:`reduce_features` chooses among the features as a patched model does before its language model, in the same
code: as if the prompt were nothing but one image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.find import find
from tokenreduce.adapters.language.generation import Forward, Generation
from tokenreduce.adapters.language.generic.observe import attach_looks
from tokenreduce.adapters.language.projector.brought import Brought
from tokenreduce.adapters.language.projector.choose import check_projector
from tokenreduce.adapters.language.projector.entries import of_tiles
from tokenreduce.adapters.language.projector.images import Images, found_in
from tokenreduce.adapters.language.projector.placing import Part, place_group
from tokenreduce.adapters.language.projector.seen import ARRIVING, Encoded
from tokenreduce.adapters.language.projector.tower import attach_tower_evidence
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.undo import Undo

__all__ = ["Item", "Kept", "reduce_features", "row_ends", "watch_features", "watched"]


@dataclass(frozen=True)
class Item:
    """One image or video of a call: its features ``rows`` (n,D), and how many of them shall stay. ``seen`` is the call
    of the tower that they are from, in which they begin at ``first``."""

    rows: Tensor
    keep: int
    seen: Encoded | None = None
    first: int = 0


@dataclass(frozen=True)
class Kept:
    """What is left of an item: ``rows`` (K,D) in the order in which they stand in the prompt, and the ``places`` (K,)
    among its n tokens whose positions they have."""

    rows: Tensor
    places: Tensor


class _Calls(dict[str, Encoded]):
    """What calls of the tower saw, of every call."""

    def __init__(self) -> None:
        self.all: list[Encoded] = []

    def __setitem__(self, kind: str, seen: Encoded) -> None:
        self.all.append(seen)


def watch_features(model: nn.Module, reducer: Projector, undo: Undo) -> Language:
    """Let the features of the image/video language model inside ``model`` tell what ``reducer`` looks at.

    Raises ``TypeError`` for a model without one, and ``ValueError`` for evidence that its tower does not give.
    """
    found = find(model)
    if found is None:
        raise TypeError(f"{type(model).__name__} is no image/video language model that is known")
    check_projector(found, reducer)
    if found.how == "table" and found.vision is not None:
        attach_tower_evidence(found, reducer.tower_blocks(), (*reducer.required(), *reducer.optional()), undo)
    elif found.how != "table":
        attach_looks(found, reducer.tower_blocks(), undo)
    return found


def row_ends(config: Any, image_size: Sequence[int]) -> tuple[int, int]:
    """How many tokens an image of ``image_size`` (rows, columns) pixels has in a model of transformers with ``config``
    that packs an overview and crops (LLaVA-NeXT, LLaVA-OneVision), and how many of them are row ends: by the model's
    own packing, before anything is encoded.

    Raises ``ValueError`` for a config of another model.
    """
    kind = MODEL_MAPPING.get(type(config), None)
    pack = getattr(kind, "pack_image_features", None)
    if pack is None:
        raise ValueError(f"{getattr(config, 'model_type', config)} packs no crops of an image with row ends")
    inner = SimpleNamespace(config=config)
    inner.pack_image_features = functools.partial(pack, inner)
    side = config.vision_config.image_size // config.vision_config.patch_size
    origin, _ = of_tiles(inner, list(image_size), side)
    return origin.n, origin.n - len(origin.seen())


@contextmanager
def watched() -> Iterator[list[Encoded]]:
    """Collect what the calls of ``get_image_features`` and ``get_video_features`` inside saw, in their order."""
    calls = _Calls()
    token = ARRIVING.set(calls)
    try:
        yield calls.all
    finally:
        ARRIVING.reset(token)


def reduce_features(
    items: Sequence[Item], kind: str, reducer: Projector, *, compact: bool, projector: nn.Module | None = None
) -> list[Kept]:
    """What ``reducer`` leaves of every item; items that are alike come to it as one batch.

    Args:
        items: the images or videos of some calls.
        kind: "image" or "video".
        reducer: its own ``keep`` is replaced by that of each item.
        compact: whether positions are counted anew: outputs then stand in the order of the plan, and at the places of
            their representatives otherwise.
        projector: makes embeddings of what a method mixes before the projector.

    Raises ``ValueError`` for a method that leaves another number of tokens than an item asks for.
    """
    out: list[Kept | None] = [None] * len(items)
    for group in _alike(items):
        chosen = [items[i] for i in group]
        for i, kept in zip(group, _reduced(chosen, kind, reducer, compact, projector), strict=True):
            out[i] = kept
    return [kept for kept in out if kept is not None]


def _alike(items: Sequence[Item]) -> list[list[int]]:
    found: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        found.setdefault((len(item.rows), item.keep, id(item.seen), _origins(item)), []).append(i)
    return list(found.values())


def _origins(item: Item) -> tuple[int, ...]:
    """What tells items of one call apart that have as many tokens, and other row ends among them."""
    out, at = [], 0
    for entry in () if item.seen is None else item.seen.entries:
        if item.first <= at < item.first + len(item.rows):
            out.append(id(entry.origin))
        at += entry.origin.n
    return tuple(out)


def _reduced(
    items: list[Item], kind: str, reducer: Projector, compact: bool, projector: nn.Module | None
) -> list[Kept]:
    x = torch.stack([item.rows for item in items])
    (batch, n), keep = x.shape[:2], items[0].keep
    if keep >= n:
        return [Kept(item.rows, torch.arange(n, device=x.device)) for item in items]
    forward = _prompt(items, x, kind)
    stay = torch.ones(batch, n, dtype=torch.bool, device=x.device)
    found = found_in(forward, x, reducer)
    made: list[Part] = []
    for group in found.groups:
        wanted = _wanted(keep, n, batch, found)
        free = group.views.n
        made += place_group(stay, group, reducer if wanted == reducer.total(free) else reducer.at(wanted), compact)
    found.keep_out(stay)
    left = stay.sum(1).tolist()
    if left != [keep] * batch:
        name = reducer.name or type(reducer).__name__
        raise ValueError(f"{name} was to leave {keep} of {n} tokens and left {left}; report this as a bug")
    for part in made:
        x = part.write(x, projector)
    return [Kept(x[b, stay[b]], stay[b].nonzero().flatten()) for b in range(batch)]


def _wanted(keep: int, n: int, batch: int, found: Images) -> int:
    """How many tokens of every image stay, where ``keep`` of an item's ``n`` shall: an item may be several images
    (tiles), and of tokens that no method sees (row ends) all stay or all go."""
    images = sum(len(group.views.rows) for group in found.groups) // batch
    seen = sum(group.views.columns.numel() for group in found.groups) // batch
    gone = sum(dropped.columns.numel() for dropped in found.dropped) // batch
    left, rest = divmod(keep - (n - seen - gone), max(images, 1))
    if rest or left < 1:
        raise ValueError(f"{keep} of {n} tokens cannot be left of {images} tiles of one image, which keep as many each")
    return left


def _prompt(items: list[Item], x: Tensor, kind: str) -> Forward:
    """A prompt in which every row is one item and nothing else."""
    visual = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    brought = Brought({kind: visual})
    seen = items[0].seen
    if seen is not None and seen.entries:
        brought.encoded[kind] = seen
        first = torch.tensor([item.first for item in items], device=x.device)
        brought.places[kind] = first[:, None] + torch.arange(x.shape[1], device=x.device)
    forward = Forward(Generation(Columns(visual)), "prefill")
    forward.state.put(brought)
    return forward
