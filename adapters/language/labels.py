"""Logits and labels of a prompt that got shorter: what comes out of the model stands at the caller's columns.

The model is made of an inner model and a head. Behind the inner model, where asked, a hook puts the last hidden states
(B,K,C) of the columns that are left back to the L columns of the caller's prompt, and everything that follows is stock:
``logits_to_keep`` counts columns of the prompt, ``labels`` and ``shift_labels`` of L columns fit, and so do losses that
are computed outside, from ``logits[:, :-1]`` and ``labels[:, 1:]``, or from the hidden states by a head of a trainer's
own (TRL).

Row j predicts column j+1. So the row of a kept column is its own; the row of a dropped column in front of a kept one
(and the last row, which predicts what comes next) is that of the last kept column before it; and the row of a dropped
column in front of a dropped one predicts nothing: it is zeros, without a gradient. Labels of dropped columns do not
count: they are -100 in the copy of the labels that the model computes with.

What a call asks for is read by a hook on the model with the head. Wrappers that call its ``forward`` directly (PEFT)
pass by its hooks; then it is read from that forward's frame.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.batching import is_paged
from tokenreduce.adapters.language.columns import Columns, slots_of
from tokenreduce.adapters.language.entered import forward_of
from tokenreduce.adapters.language.generation import KEYWORD, Forward, cache_in, generation_of
from tokenreduce.adapters.language.indices import ColumnIndex, SlotIndex
from tokenreduce.core.plan import take
from tokenreduce.core.undo import Undo

__all__ = ["attach_labels", "kept_of", "note_kept"]

_KEPT = "_tokenreduce_kept"


@dataclass(frozen=True)
class Kept:
    """The ``columns`` (B,K) of a prompt of ``length`` that came out of the last layer, None for all of them."""

    batch: int
    length: int
    device: torch.device
    columns: ColumnIndex | None = None

    @staticmethod
    def of(columns: Columns, front: int = 0) -> Kept:
        """Of the columns behind the first ``front``, which an earlier call put into the cache."""
        (batch, length), device = columns.visual.shape, columns.visual.device
        kept = Kept(batch, length - front, device)
        if not columns.cuts:
            return kept
        left = columns.cuts[-1].columns.part(slice(front, None))
        return replace(kept, columns=ColumnIndex(left.at - front, left.there))

    def every(self) -> ColumnIndex:
        """(B,K) the columns, all of them named."""
        if self.columns is not None:
            return self.columns
        return ColumnIndex(torch.arange(self.length, device=self.device).expand(self.batch, -1))

    @functools.cached_property
    def slots(self) -> SlotIndex:
        """(B,L) which of the K slots holds a column, -1 where it was dropped."""
        return slots_of(self.every(), self.length)

    def expand(self, hidden: Tensor) -> Tensor:
        """``hidden`` (B,K,C) at all columns, (B,L,C)."""
        slots = self.slots.at.to(hidden.device)
        last = slots.cummax(1).values  # slots ascend with columns
        there = slots >= 0
        predicts = torch.cat([there[:, 1:], torch.ones_like(there[:, :1])], 1)
        empty = (last < 0) | ~(there | predicts)
        return take(hidden, last.clamp(min=0)).masked_fill(empty.unsqueeze(-1), 0)


@dataclass
class Ask:
    """What a call of the model with the head asks of its ``inner`` model: whether it ``wanted`` the caller's columns,
    its ``logits_to_keep`` and labels, and whether it counts labels itself (``num_items_in_batch``)."""

    inner: nn.Module
    wanted: bool
    keep: Any
    labels: Tensor | None
    shifted: Tensor | None
    counted: bool
    kept: Kept | None = None

    @staticmethod
    def of(generator: Any, given: dict[str, Any], always: bool) -> Ask:
        """The last row is the same in both forms, so that ``logits_to_keep=1``, as in ``generate``, wants nothing."""
        keep = given.get("logits_to_keep", 0)
        one, some = (False, True) if isinstance(keep, Tensor) else (keep == 1, keep != 0)
        labels, shifted = (given.get(name) for name in ("labels", "shift_labels"))
        counted = given.get("num_items_in_batch") is not None  # without labels, a trainer computes its loss outside
        asks = labels is not None or shifted is not None or counted or some
        return Ask(generator.model, not one and (always or asks or generator.training), keep, labels, shifted, counted)


class _Last(threading.local):
    """Inner model -> what its last forward in this thread kept."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


_LAST = _Last()
_ASK: ContextVar[Ask | None] = ContextVar("tokenreduce_ask", default=None)
#: The call whose labels are not copies yet, between its inner model and its loss.
_LOSS: ContextVar[Ask | None] = ContextVar("tokenreduce_loss", default=None)


def attach_labels(inner: nn.Module, generator: nn.Module | None, undo: Undo) -> None:
    """Let the logits and labels of ``generator`` be at the caller's columns; note what was kept by ``inner``.

    Raises ``ValueError`` where such logits are wanted of a model without a head.
    """
    always = undo.logits == "caller"
    undo.hook(inner, functools.partial(place, always=always), with_kwargs=True)
    if generator is None:
        if always:
            raise ValueError(
                f"logits='caller' needs a model with a language head (...ForConditionalGeneration) around "
                f"{type(inner).__name__}; patch that one, or leave logits out"
            )
        return
    undo.pre_hook(generator, functools.partial(ask, always=always))
    undo.hook(generator, answer, with_kwargs=True, always=True)
    if "self.loss_function" in inspect.getsource(type(generator).forward):  # not Gemma3 in early releases
        stock: Any = generator.loss_function
        undo.set(generator, "_loss_function", functools.partial(loss_of, stock))


def ask(
    generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, always: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the model with the head: what this call asks for, with copies of its labels to write into."""
    if len(args) > 1:  # labels may be among them
        names = list(inspect.signature(type(generator).forward).parameters)[1:]
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    given = {k: _own(generator, kwargs[k]) for k in ("labels", "shift_labels") if isinstance(kwargs.get(k), Tensor)}
    kwargs = {**kwargs, **given}
    _ASK.set(Ask.of(generator, kwargs, always))
    return args, kwargs


def _own(generator: Any, labels: Tensor) -> Tensor:
    """A copy of ``labels`` to write into, where accelerate will not make another one of it."""
    device = getattr(getattr(generator, "_hf_hook", None), "execution_device", None)
    return labels.clone() if device is None else labels.to(device, copy=True)


def place(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, always: bool) -> Any:
    """Hook on the inner model: note what is left, and put it at the caller's columns where that is wanted."""
    forward: Forward | None = kwargs.get(KEYWORD) or forward_of(inner)
    mine = _ASK.get()
    _LOSS.set(None)
    hidden: Tensor = output[0]
    if forward is None:
        cache = cache_in(kwargs)
        if cache is not None and is_paged(cache):
            return None  # continuous batching, text alone
        if cache is not None and int(cache.get_seq_length()) > hidden.shape[1]:
            return None  # a later forward of a prompt without visual tokens
        kept = Kept(hidden.shape[0], hidden.shape[1], hidden.device)
    else:
        kept = Kept.of(forward.columns, forward.columns.front)
    _LAST.kept[inner] = kept
    _note(output, kept)
    hooked = mine is not None and mine.inner is inner
    if hooked and mine is not None:
        mine.kept = kept
    if forward is None or not forward.prefill or kept.columns is None:
        return None
    mine = mine if hooked else _passed_by(inner, always)
    if mine is None:
        return None
    mine.kept = kept
    if hooked:
        _ignore_dropped(mine, mine.labels, mine.shifted)
    elif mine.labels is not None:
        _LOSS.set(mine)
    if not mine.wanted:
        return None
    hidden = kept.expand(hidden)
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


def _passed_by(inner: nn.Module, always: bool) -> Ask | None:
    """What is asked by a forward that was called without its hooks and has called ``inner``, None if none has."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and "labels" in frame.f_code.co_varnames:
            seen = frame.f_locals
            caller = seen.get("self")
            if isinstance(caller, nn.Module) and caller._modules.get("model") is inner:
                return Ask.of(caller, {**seen.get("kwargs", {}), **seen}, always)
        frame = frame.f_back
    return None


def loss_of(stock: Any, logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """``stock`` loss; where the call passed by our hooks, with copies of its labels, -100 at dropped columns."""
    asked, shifted = _LOSS.get(), kwargs.get("shift_labels")
    _LOSS.set(None)
    if asked is not None:
        labels, shifted = (t if t is None else t.clone() for t in (labels, shifted))
        _ignore_dropped(asked, labels, shifted)
        kwargs = kwargs if shifted is None else {**kwargs, "shift_labels": shifted}
    return stock(logits, labels, *args, **kwargs)


def answer(generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook on the model with the head, which runs behind errors as well: the call is over."""
    asked = _ASK.get()
    _ASK.set(None)
    if asked is not None and asked.kept is not None:
        _note(output, asked.kept)


def _note(output: Any, kept: Kept) -> None:
    """What was kept travels on an output object; a tuple has no room for it."""
    if hasattr(output, "__dict__"):
        setattr(output, _KEPT, kept)


def note_kept(site: nn.Module, output: Any, columns: Columns) -> None:
    """Let :func:`kept_of` know what the call of ``site`` that gave ``output`` left of its prompt."""
    _LAST.kept[site] = kept = Kept.of(columns, columns.front)
    _note(output, kept)


def _ignore_dropped(asked: Ask, labels: Tensor | None, shifted: Tensor | None) -> None:
    """Write -100 to the labels of dropped columns, in place.

    Raises ``ValueError`` for labels of other columns than those of the logits.
    """
    kept = asked.kept
    assert kept is not None
    gone = ~kept.slots.real()
    following = torch.cat([gone[:, 1:], torch.zeros_like(gone[:, :1])], 1)
    for given, ignored in ((labels, gone), (shifted, following)):
        if given is None:
            continue
        ignored = _picked(ignored, asked.keep).to(given.device)
        if given.shape != ignored.shape:
            raise ValueError(
                f"labels of shape {tuple(given.shape)} for logits at {tuple(ignored.shape)} columns: give labels of "
                f"the {kept.length} columns of the prompt, or of those that logits_to_keep names (labels[:, -n:] "
                f"with logits_to_keep=n)"
            )
        if asked.counted and bool((ignored & (given != -100)).any()):
            warnings.warn(
                "labels of visual tokens that were dropped do not count in the loss, but num_items_in_batch counts "
                "them; set the labels of image and video placeholders to -100",
                stacklevel=2,
            )
        given.masked_fill_(ignored, -100)


def _picked(t: Tensor, keep: Any) -> Tensor:
    """What the library's ``logits_to_keep`` takes of ``t`` (B,L)."""
    if isinstance(keep, Tensor):
        keep = keep.to(t.device)
        if keep.dim() == 2:
            return t[keep] if keep.dtype == torch.bool else torch.take_along_dim(t, keep, 1)
    return t[:, slice(-keep, None) if isinstance(keep, int) else keep]


def kept_of(source: Any) -> tuple[Tensor, Tensor]:
    """See :func:`tokenreduce.kept_columns`."""
    if isinstance(source, nn.Module):
        kept = next((_LAST.kept[m] for m in source.modules() if m in _LAST.kept), None)
        if kept is None:
            raise ValueError(f"no forward of this {type(source).__name__} in this thread yet; run it on a prompt first")
        return _pair(kept)
    kept = getattr(source, _KEPT, None)
    if kept is None:
        cache = next(
            (c for c in (getattr(source, n, None) for n in ("cache", "past_key_values")) if c is not None), None
        )
        generation = None if cache is None else generation_of(cache)
        if generation is None:
            raise ValueError(
                f"this {type(source).__name__} does not say which columns were kept: give the output object of a "
                f"patched image/video language model (return_dict=True, uncopied), or the model after its forward"
            )
        kept = Kept.of(generation.columns)
    return _pair(kept)


def _pair(kept: Kept) -> tuple[Tensor, Tensor]:
    columns = kept.every()
    return columns.at, columns.real()
