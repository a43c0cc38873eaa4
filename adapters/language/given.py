"""Which columns of a prompt are visual tokens, where the caller merged the embeddings and ids do not say so.

Three things tell: embeddings that still are the placeholder's, token types beside them, and features that this model's
``get_image_features`` made just before, which are found again by their rows. A prompt of token embeddings alone is
text. What is left cannot be told, and is said once: nothing is reduced in silence.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.projector.brought import Brought
from tokenreduce.adapters.language.projector.seen import WATCHING, Encoded, encoded_in
from tokenreduce.core.trace import active
from tokenreduce.core.undo import Undo

__all__ = ["Arrived", "attach_given", "brought_by", "say_late", "say_strange"]

#: Where a model has its :class:`Arrived`.
_ARRIVED = "_tokenreduce_arrived"
#: Channels that are compared; as many rows agree in all of them only where they are the same.
_CHANNELS = 64
#: Calls of get_image_features that are remembered for one prompt.
_CALLS = 64


@dataclass
class _Call:
    kind: str
    prints: Tensor
    encoded: Encoded | None
    thread: int


class Arrived:
    """Features that were made and are in no prompt of ids, newest last. Copies of a patched model start empty.

    Features are known by what they are, so threads may share them; each forgets only its own.
    """

    def __init__(self) -> None:
        self.calls: tuple[_Call, ...] = ()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return (Arrived, ())

    def add(self, kind: str, features: Any, dtype: torch.dtype, encoded: Encoded | None) -> None:
        parts = features if isinstance(features, list | tuple) else [features]
        rows = torch.cat([prints(f.detach().flatten(0, -2).to(dtype)) for f in parts])
        with self._lock:
            self.calls = (*self.calls, _Call(kind, rows, encoded, threading.get_ident()))[-_CALLS:]

    def clear(self, keep: tuple[_Call, ...] = ()) -> None:
        """Forget what this thread made, but for ``keep``."""
        mine = threading.get_ident()
        if self.calls:
            with self._lock:
                self.calls = tuple(c for c in self.calls if c.thread != mine or any(c is k for k in keep))


def attach_given(found: Language, arrived: Arrived, undo: Undo) -> None:
    """Remember in ``arrived`` what ``get_image_features`` and ``get_video_features`` make, so that it is known in
    embeddings that the caller merges."""
    undo.set(found.inner, _ARRIVED, arrived)
    for name, mixin in (("get_image_features", RememberedImages), ("get_video_features", RememberedVideos)):
        if hasattr(found.inner, name):
            undo.mix_in(found.inner, mixin)


class RememberedImages(nn.Module):
    """Mixin of models with ``get_image_features``."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return remember(self, "image", super().get_image_features(*args, **kwargs))  # type: ignore[misc]


class RememberedVideos(nn.Module):
    """Mixin of models with ``get_video_features``."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return remember(self, "video", super().get_video_features(*args, **kwargs))  # type: ignore[misc]


def remember(inner: Any, kind: str, output: Any) -> Any:
    """``output`` of ``get_image_features`` or ``get_video_features`` of ``inner``, whose rows are remembered."""
    features = getattr(output, "pooler_output", None)
    inside = WATCHING.get() is not None  # Qwen3-VL's videos go through its get_image_features
    if features is not None and not inside and not torch.compiler.is_compiling():
        arrived: Arrived = vars(inner)[_ARRIVED]
        arrived.add(kind, features, inner.get_input_embeddings().weight.dtype, encoded_in(output))
    return output


# -- what a prompt brings --------------------------------------------------------------------------------------------
def brought_by(
    inner: Any, embeds: Tensor, ids: tuple[int, ...], arrived: Arrived, types: Tensor | None, mask: Any
) -> Brought:
    """What is in ``embeds`` (B,L,D), by the placeholders ``ids``, the features that ``arrived`` and the caller's token
    ``types`` (B,L): 1 for images, 2 for videos. ``mask`` is the caller's."""
    table = inner.get_input_embeddings()
    names = ("image", "video")
    kinds = {
        k: (embeds == table(torch.tensor(i, device=embeds.device))).all(-1) for k, i in zip(names, ids, strict=False)
    }
    out = Brought(kinds)
    if isinstance(types, Tensor) and types.shape == embeds.shape[:2]:
        for number, name in enumerate(names, 1):
            if name in kinds or bool((types == number).any()):
                kinds[name] = kinds.get(name, torch.zeros_like(types, dtype=torch.bool)) | (types == number)
    else:
        types = None
    if arrived.calls:
        _recognise(out, prints(embeds.detach().flatten(0, 1)).view(embeds.shape[:2]), arrived)
    if types is None:  # nobody says that the rest is text
        rest = ~out.visual
        if isinstance(mask, Tensor) and mask.shape == rest.shape:
            rest = rest & mask.bool()
        out.strange = not _are_tokens(table, embeds.detach()[rest])
    return out


def _recognise(out: Brought, rows: Tensor, arrived: Arrived) -> None:
    """Find the features of every call in ``rows`` (B,L), the prints of a prompt's embeddings."""
    calls = arrived.calls
    every = _places(rows, torch.cat([call.prints.to(rows.device) for call in calls]))
    used, start = [], 0
    for number, call in enumerate(calls):
        end = start + len(call.prints)
        here = (every >= start) & (every < end)
        place = torch.where(here, every - start, -1)
        start = end
        if not bool(here.any()):
            continue
        used.append(call)
        key = f"{call.kind} {number}"
        for name in ("image", "video"):
            if name in out.kinds:
                out.kinds[name] = out.kinds[name] & ~here
        out.kinds[key], out.places[key] = here, place
        if call.encoded is not None and _whole(place, call.encoded):
            out.encoded[key] = call.encoded
    if used:  # other prompts may ask about the same images
        arrived.clear(tuple(used))


def _places(rows: Tensor, features: Tensor) -> Tensor:
    """(B,L) which of ``features`` (N,) each of ``rows`` is, -1 for none. Of equal ones, those are meant that make the
    longest piece in order."""
    here = torch.isin(rows, features)
    place = torch.full_like(rows, -1)
    after = 0  # where the last piece ended: images often come in order
    for r in here.any(1).nonzero().flatten().tolist():
        columns = here[r].nonzero().flatten()
        shown, done = rows[r, columns], 0
        while done < len(columns):
            starts = (features == shown[done]).nonzero().flatten().tolist()
            starts.sort(key=lambda i: i != after)
            lengths = [_common(features[i:], shown[done:]) for i in starts]
            best = max(range(len(starts)), key=lengths.__getitem__)
            first, n = starts[best], lengths[best]
            place[r, columns[done : done + n]] = torch.arange(first, first + n, device=rows.device)
            done, after = done + n, first + n
    return place


def _common(one: Tensor, other: Tensor) -> int:
    """How many of the first numbers of two rows agree."""
    n = min(len(one), len(other))
    differ = (one[:n] != other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def _whole(place: Tensor, encoded: Encoded) -> bool:
    """Whether features stand side by side as they came, image by image, so that evidence of the tower is theirs."""
    edges = torch.tensor([0, *(e.origin.n for e in encoded.entries)], device=place.device).cumsum(0)
    left, right = place[:, :-1], place[:, 1:]
    new = torch.isin(right, edges) & torch.isin(left + 1, edges)
    return bool(((right == left + 1) | new | (left < 0) | (right < 0)).all())


def _are_tokens(table: Any, rows: Tensor) -> bool:
    """Whether all of ``rows`` (M,D) are embeddings of tokens."""
    if not len(rows):
        return True
    at = _channels(rows.shape[1], rows.device)
    weight = getattr(table, "weight", None)
    known = None
    if isinstance(weight, Tensor) and weight.shape[1:] == rows.shape[1:] and isinstance(table, nn.Embedding):
        known = weight.detach()[:, at]
        if isinstance(scale := getattr(table, "embed_scale", None), Tensor | float | int):
            known = known * (scale.to(known.dtype) if isinstance(scale, Tensor) else scale)
        if not torch.equal(table(torch.zeros(1, dtype=torch.long, device=rows.device)).detach()[:, at], known[:1]):
            known = None
    if known is None:  # another kind of embedding: ask it
        count = int(getattr(table, "num_embeddings", 0))
        known = table(torch.arange(count, device=rows.device)).detach()[:, at] if count else rows[:0, at]
    return bool(torch.isin(prints(rows[:, at]), prints(known.to(rows))).all())


def _channels(width: int, device: Any) -> Tensor:
    count = min(width, _CHANNELS)
    return torch.arange(count, device=device) * width // count


def prints(rows: Tensor) -> Tensor:
    """(M,) int64 of ``rows`` (M,D): equal for rows of equal bits, and for no others in practice."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.long, device=rows.device)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = rows[:, _channels(rows.shape[1], rows.device)].contiguous().view(kind).long()
    odd = torch.arange(bits.shape[1], device=rows.device) * 2 + 1
    odd = odd * 0x9E3779B97F4A7C1 + (odd << 31)
    bits = (bits + 1) * odd
    return (bits ^ (bits >> 29)).sum(1)


# -- what cannot be done is said -------------------------------------------------------------------------------------
def say_strange(methods: str, others: bool) -> None:
    """Say that nothing tells which of a prompt's embeddings are visual tokens; ``others`` are known to be."""
    what = "only visual tokens that are known are reduced" if others else "nothing is reduced"
    _say(
        f"{methods}: {what} in this call. It brings inputs_embeds that are not all embeddings of tokens, and nothing "
        f"tells which of them are visual. Pass input_ids and pixel_values; or mm_token_type_ids beside "
        f"inputs_embeds; or make the features with the patched model's get_image_features"
    )


def say_late(methods: str, turn: bool) -> None:
    """Say that images which come onto a cache stay as they are; ``turn`` for one with a reduced prompt in it."""
    what = "a later turn brings images" if turn else "the cache holds text already, and this call brings images"
    better = "" if turn else ", or choose methods of stage projector and a dynamic cache, where no layer has a window"
    _say(
        f"{methods}: {what}, whose tokens stay as they are; to reduce them give the whole prompt, images included, in "
        f"one call without a cache{better}"
    )


def _say(message: str) -> None:
    if (trace := active()) is not None:
        trace.note(message)
    warnings.warn(message, UserWarning, stacklevel=2)
