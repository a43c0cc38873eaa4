"""What ``get_image_features`` and ``get_video_features`` of a discovered model were given and saw, on their output.

``generate`` calls them before the model's forward and hands on the output alone, so the grids of the images, and
queries and keys of the tower's blocks that a method looks at, travel on that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import WATCH, listen
from tokenreduce.adapters.encoders.plain import plainly
from tokenreduce.adapters.encoders.state import collect_states
from tokenreduce.adapters.language.entered import entered
from tokenreduce.adapters.language.families import Language, Vision
from tokenreduce.adapters.language.generic.encoder import left_of
from tokenreduce.adapters.language.generic.features import FIELDS, lengths_of
from tokenreduce.adapters.language.generic.grids import Shape, origin_of, shapes
from tokenreduce.adapters.language.generic.patches import tokens_of_slots
from tokenreduce.adapters.language.generic.towers import attention_in
from tokenreduce.adapters.language.projector.seen import ARRIVING, Encoded, Entry, _of_patches, put_on
from tokenreduce.core.evidence import Attention, BaseEvidence, Look, Origin, resolve
from tokenreduce.core.plan import Plan
from tokenreduce.core.undo import Undo

__all__ = ["attach_looks"]

#: Where an inner model has its :class:`Looks`.
LOOKS = "_tokenreduce_looks"
#: Whether features are being made: a family may make those of videos as images.
_INSIDE: ContextVar[bool] = ContextVar("tokenreduce_observing", default=False)


@dataclass
class Looks:
    """What is looked at: the tower of ``vision`` in its ``blocks`` (attention module -> block), and, by what an image
    looks like, the token of every slot, once it is known."""

    vision: Vision
    blocks: dict[Any, int]
    known: dict[Any, Tensor | None] = field(default_factory=dict)
    #: Depth and leading tokens of a tower in which methods act, None where none do.
    reduced: tuple[int, int] | None = None


@dataclass
class Seen:
    """Queries and keys (H,n,d) of one sequence in one call of an attention, and (n,n) what sees what, None for all."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    scale: float | None


def attach_looks(found: Language, looks: tuple[Look, ...], undo: Undo, reduced: tuple[int, int] | None = None) -> None:
    """Let the model's features tell what is known of them, and of the tower the blocks that a method ``looks`` at;
    ``reduced`` are depth and leading tokens of a tower in which methods act."""
    inner, vision = found.inner, found.vision
    assert vision is not None
    wanted = {resolve(look, vision.depth, vision.feature) for look in looks}
    blocks: dict[Any, int] = {}
    copies: dict[int, Any] = {}
    for b in sorted(wanted):
        attention = attention_in(vision.blocks[0][b])
        listen(attention, undo, copies)
        blocks[attention] = b
    undo.set(inner, LOOKS, Looks(vision, blocks, reduced=reduced))
    for kind, mixin in (("image", ObservedImages), ("video", ObservedVideos)):
        if hasattr(inner, f"get_{kind}_features"):
            undo.mix_in(inner, mixin)


class ObservedImages(nn.Module):
    """Mixin of models with ``get_image_features``."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return observe(self, "image", super().get_image_features, args, kwargs)  # type: ignore[misc]


class ObservedVideos(nn.Module):
    """Mixin of models with ``get_video_features``."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return observe(self, "video", super().get_video_features, args, kwargs)  # type: ignore[misc]


def observe(inner: Any, kind: str, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The features that ``stock`` makes, with what is known of them put on the output."""
    call = entered.get()
    if call is not None and (made := call.answers.pop(kind, None)) is not None:
        return made
    if _INSIDE.get():
        return stock(*args, **kwargs)
    looks: Looks = vars(inner)[LOOKS]
    seen: dict[int, list[Seen]] = {b: [] for b in looks.blocks.values()}

    def watch(module: Any, query: Tensor, key: Tensor, mask: Any) -> None:
        if (block := looks.blocks.get(module)) is not None:
            seen[block] += _sequences(module, query, key, mask)

    token, inside = WATCH.set(watch if seen else None), _INSIDE.set(True)
    try:
        collecting: Any = collect_states() if looks.reduced is not None else nullcontext([])
        with collecting as states:
            output = stock(*args, **kwargs)
        value = next((v for n in FIELDS if (v := getattr(output, n, None)) is not None), None)
        if value is None or not hasattr(output, "items"):
            return output
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        again = lambda: _value(stock(*args, **{**kwargs, "return_dict": True}))
        WATCH.set(None)
        with plainly():
            found = _encoded(looks, given, lengths_of(value), seen, again)
        if looks.reduced is not None:
            note_left(inner, looks, found, states)
        put_on(output, found)
        if (arriving := ARRIVING.get()) is not None:
            arriving[kind] = found
    finally:
        _INSIDE.reset(inside)
        WATCH.reset(token)
    return output


def _value(output: Any) -> Any:
    return next(v for n in FIELDS if (v := getattr(output, n, None)) is not None)


def _sequences(module: Any, query: Tensor, key: Tensor, mask: Any) -> list[Seen]:
    out, scale = [], getattr(module, "scaling", None)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = mask if mask.dtype == torch.bool else mask == 0
        mask = mask.expand(len(query), -1, query.shape[2], -1)
    else:
        mask = None
    for i in range(len(query)):
        out.append(Seen(query[i].detach(), key[i].detach(), None if mask is None else mask[i, 0], scale))
    return out


@dataclass
class Found(Encoded):
    """Images of a discovered model; ``sequences`` are what its blocks saw, ``slots`` the (views,P) slots of each view
    among those of all sequences, with the sequence that they are in."""

    sequences: dict[int, list[Seen]] = field(default_factory=dict)
    slots: list[tuple[int, Tensor]] = field(default_factory=list)
    #: Why no method can look at the tower, where that is so.
    blind: str = ""
    #: (slots,) where a method acted in the tower: the places of tokens that are left, and the size of every slot's.
    stays: Tensor | None = None
    counts: Tensor | None = None

    def evidence(self, block: int, views: Tensor) -> BaseEvidence:
        if self.blind:
            raise ValueError(
                f"{self.blind}, so that no method can look at the tower there; choose one that looks at embeddings "
                f"(divprune, random)"
            )
        q, k, masks = [], [], []
        for v in views.tolist():
            number, where = self.slots[v]
            one = self.sequences[block][number]
            q.append(one.queries[:, where])
            k.append(one.keys[:, where])
            masks.append(None if one.mask is None else one.mask[where][:, where])
        mask = None
        if any(m is not None for m in masks):
            full = torch.ones(len(self.slots[int(views[0])][1]), 1, dtype=torch.bool, device=q[0].device)
            rows = [full.expand(-1, len(full)) if m is None else m for m in masks]
            own = torch.eye(len(full), dtype=torch.bool, device=full.device)
            mask = torch.stack([r | own for r in rows])[:, None]  # rows of padding must not be empty
        scale = self.sequences[block][0].scale
        seen = Attention(torch.stack(q), torch.stack(k), mask=mask, cls=False, rope="post", scale=scale)
        return _of_patches(seen, block, self.vision.depth, 0)

    def plan_at(self, block: int, views: Tensor) -> Plan | None:
        return None

    def left(self, views: Tensor) -> Tensor | None:
        return self._of_views(self.stays, views)

    def sizes(self, views: Tensor) -> Tensor | None:
        return self._of_views(self.counts, views)

    def _of_views(self, each: Tensor | None, views: Tensor) -> Tensor | None:
        if each is None:
            return None
        return torch.stack([each[self.slots[v][1].to(each.device)] for v in views.tolist()]).to(views.device)


def note_left(inner: Any, looks: Looks, found: Found, states: list[Any]) -> None:
    """Note which slots a method in the tower left. Raises ``ValueError`` where nobody knows what tokens are made of."""
    assert looks.reduced is not None
    depth, prefix = looks.reduced
    if found.blind:
        raise ValueError(
            f"{type(inner).__name__}: {found.blind}, so that nobody can say which go when a method in the vision tower "
            f"merges patches; choose one before the language model (divprune), or in the tower alone: "
            f"tr.patch(model's tower, ...)"
        )
    if len(states) != depth:
        raise ValueError(
            f"the vision tower of {type(inner).__name__} ran {len(states) / depth:g} times for one call of its "
            f"features, so that nobody can say which patches tokens are made of; choose a method before the language "
            f"model"
        )
    found.stays, found.counts = left_of(states, depth, min(looks.vision.feature, depth - 1), prefix)


def _encoded(
    looks: Looks, given: dict[str, Any], lengths: list[int], seen: dict[int, list[Seen]],
    again: Callable[[], Any],
) -> Found:  # fmt: skip
    """What is known of the images of a call."""
    device = next(v.device for v in given.values() if isinstance(v, Tensor))
    own, known = shapes(given, lengths)
    blind = ""
    if looks.vision.depth and (looks.blocks or looks.reduced is not None or None in known):
        tokens = _tokens(looks, given, own, seen, again)
        sequences = next(iter(seen.values()), [])
        if tokens is None:
            blind = "what a token of this model is made of could not be told (it may see all patches)"
        elif looks.blocks and sum(s.keys.shape[1] for s in sequences) != len(tokens):
            blind = "the blocks that are looked at see another number of patches than enter the projector"
        elif looks.blocks:
            return _looked(looks, own, known, seen, tokens, device)
        elif looks.reduced is not None:
            return _inside(looks, own, known, tokens.to(device), device)
        else:
            found = Found(looks.vision, (), entries=_entries(own, known, tokens, device))
            return found
    found = Found(looks.vision, tuple(seen), entries=_entries(own, known, None, device))
    found.blind = blind
    return found


def _tokens(
    looks: Looks, given: dict[str, Any], own: list[int], seen: dict[int, list[Seen]], again: Callable[[], Any]
) -> Tensor | None:
    sizes = tuple(
        (n, tuple(v.flatten().tolist())) for n, v in given.items()
        if isinstance(v, Tensor) and not v.is_floating_point() and v.numel() < 4096
    )  # fmt: skip
    pixels = tuple(tuple(v.shape) for v in given.values() if isinstance(v, Tensor) and v.is_floating_point())
    key = (sizes, pixels, tuple(own))
    if key not in looks.known:
        if len(looks.known) >= 64:
            looks.known.clear()
        looks.known[key] = tokens_of_slots(looks.vision.blocks[0], again)
    return looks.known[key]


def _entries(own: list[int], known: list[Shape | None], tokens: Tensor | None, device: Any) -> list[Entry]:
    """The images one by one, each of one view per frame; tokens that no patch is in stand for none."""
    out, first, start = [], 0, 0
    for n, shape in zip(own, known, strict=True):
        origin = origin_of(shape, n, device)
        if tokens is not None:
            there = torch.zeros(n, dtype=torch.bool, device=device)
            mine = tokens[(tokens >= start) & (tokens < start + n)] - start
            there[mine.to(device)] = True
            origin = _without(origin, ~there)
        out.append(Entry(origin, first))
        first, start = first + origin.views, start + n
    return out


def _without(origin: Origin, gone: Tensor) -> Origin:
    """``origin`` in which the tokens ``gone`` (n,) stand for no patch."""
    if not bool(gone.any()):
        return origin
    weight = torch.full(origin.index.shape, 1 / origin.index.shape[1], device=gone.device)
    weight = (weight if origin.weight is None else origin.weight).masked_fill(gone[:, None], 0)
    return Origin(
        origin.index, weight, origin.patches, origin.view.masked_fill(gone, -1), origin.place, origin.shape, None,
        origin.views,
    )  # fmt: skip


def _inside(looks: Looks, own: list[int], known: list[Shape | None], tokens: Tensor, device: Any) -> Found:
    """Images of a tower in which methods act: each is one view, of the slots that its tokens are made of."""
    entries: list[Entry] = []
    slots: list[tuple[int, Tensor]] = []
    start = 0
    for n, shape in zip(own, known, strict=True):
        mine = ((tokens >= start) & (tokens < start + n)).nonzero().flatten()
        entries.append(Entry(_origin(tokens, [(0, mine)], [0], start, n, shape, device), len(slots)))
        slots.append((0, mine))
        start += n
    return Found(looks.vision, (), entries=entries, slots=slots)


def _looked(
    looks: Looks, own: list[int], known: list[Shape | None], seen: dict[int, list[Seen]], tokens: Tensor, device: Any
) -> Found:
    """Images whose tokens are made of slots that the tower's attention saw."""
    sequences = next(iter(seen.values()))
    starts = torch.tensor([0, *[s.keys.shape[1] for s in sequences]]).cumsum(0).tolist()
    tokens = tokens.to(device)
    entries: list[Entry] = []
    slots: list[tuple[int, Tensor]] = []
    start = 0
    for n, shape in zip(own, known, strict=True):
        mine = ((tokens >= start) & (tokens < start + n)).nonzero().flatten()
        views = []
        for number, sequence in enumerate(sequences):
            here = mine[(mine >= starts[number]) & (mine < starts[number + 1])] - starts[number]
            if not len(here):
                continue
            size = sequence.keys.shape[1]
            where = torch.arange(size, device=device)
            if sequence.mask is not None:  # images in one sequence that do not see each other
                where = where[sequence.mask[here].any(0) | torch.isin(where, here)]
            views.append((number, where))
        if len({len(w) for _, w in views}) > 1 or not views:
            found = Found(looks.vision, tuple(seen), entries=_entries(own, known, tokens, device))
            found.blind = "an image is seen in pieces of unequal size"
            return found
        entries.append(Entry(_origin(tokens, views, starts, start, n, shape, device), len(slots)))
        slots += views
        start += n
    return Found(looks.vision, tuple(seen), entries=entries, sequences=seen, slots=slots)


def _origin(
    tokens: Tensor, views: list[tuple[int, Tensor]], starts: list[int], start: int, n: int, shape: Shape | None,
    device: Any,
) -> Origin:  # fmt: skip
    """Where the tokens ``start`` to ``start + n`` come from, of ``views`` that have as many slots each."""
    size = len(views[0][1])
    token = torch.cat([tokens[where + starts[number]] for number, where in views]) - start
    slot = ((token >= 0) & (token < n)).nonzero().flatten()
    slot = slot[token[slot].argsort(stable=True)]
    count = torch.bincount(token[slot], minlength=n)
    most = max(int(count.max()), 1)
    place = torch.arange(len(slot), device=device) - (count.cumsum(0) - count)[token[slot]]
    index = torch.zeros(n, most, dtype=torch.long, device=device)
    index[token[slot], place] = slot
    share = (torch.arange(most, device=device) < count[:, None]).float() / count.clamp(min=1)[:, None]
    even = bool((count == most).all())
    view = torch.where(count > 0, index[:, 0] // size, -1)
    flat = origin_of(shape, n, device)
    h, w = flat.shape
    return Origin(index, None if even else share, size, view, flat.place, (h, w), None, len(views))
