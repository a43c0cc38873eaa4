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
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.generation import KEYWORD, Run, cache_in, run_of
from tokenreduce.patching import Undo
from tokenreduce.plan import take

__all__ = ["attach_labels", "kept_of"]

_KEPT = "_tokenreduce_kept"


@dataclass(frozen=True)
class Kept:
    """Columns of a prompt of ``length`` that came out of the last layer: ``index`` (B,K), None for all of them, and
    ``valid`` (B,K), None where all are real."""

    batch: int
    length: int
    device: torch.device
    index: Tensor | None = None
    valid: Tensor | None = None

    @staticmethod
    def of(run: Run) -> Kept:
        (batch, length), device = run.visual.shape, run.visual.device
        cut = run.cuts[-1] if run.cuts else None
        return Kept(batch, length, device) if cut is None else Kept(batch, length, device, cut.index, cut.valid)

    def pair(self) -> tuple[Tensor, Tensor]:
        """``(columns, valid)``, (B,K) long and bool."""
        index = self.index
        if index is None:
            index = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        return index, torch.ones_like(index, dtype=torch.bool) if self.valid is None else self.valid

    @cached_property
    def slots(self) -> Tensor:
        """(B,L) which of the K slots holds a column, -1 where it was dropped."""
        index, valid = self.pair()
        slot = torch.arange(index.shape[1], device=index.device).expand_as(index)
        out = index.new_full((self.batch, self.length + 1), -1)
        return out.scatter(1, torch.where(valid, index, self.length), slot)[:, : self.length]

    def expand(self, hidden: Tensor) -> Tensor:
        """``hidden`` (B,K,C) at all columns, (B,L,C)."""
        slots = self.slots.to(hidden.device)
        last = slots.cummax(1).values  # slots ascend with columns
        there = slots >= 0
        predicts = torch.cat([there[:, 1:], torch.ones_like(there[:, :1])], 1)
        empty = (last < 0) | ~(there | predicts)
        return take(hidden, last.clamp(min=0)).masked_fill(empty.unsqueeze(-1), 0)


@dataclass
class Ask:
    """What a call of the generator asks of its inner model."""

    inner: nn.Module
    wanted: bool
    keep: Any
    labels: Tensor | None
    shifted: Tensor | None
    counted: bool
    kept: Kept | None = None


class _Last(threading.local):
    """Inner model -> what its last forward in this thread kept."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


_LAST = _Last()
_ASK: ContextVar[Ask | None] = ContextVar("tokenreduce_ask", default=None)


def attach_labels(inner: nn.Module, generator: nn.Module | None, undo: Undo) -> None:
    """Let the logits and labels of ``generator`` be at the caller's columns; note what was kept by ``inner``.

    Raises ``ValueError`` where such logits are wanted of a model without a head.
    """
    undo.hook(inner, place, with_kwargs=True)
    if generator is None:
        if undo.logits == "caller":
            raise ValueError(
                f"logits='caller' needs a model with a language head (...ForConditionalGeneration) around "
                f"{type(inner).__name__}; patch that one, or leave logits out"
            )
        return
    undo.pre_hook(generator, partial(ask, always=undo.logits == "caller"))
    undo.hook(generator, answer, with_kwargs=True, always=True)


def ask(
    generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, always: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the model with the head: whether this call wants its caller's columns.

    The last row is the same in both forms, so that ``logits_to_keep=1``, as in ``generate``, never does.
    """
    if len(args) > 1:  # labels may be among them
        names = list(inspect.signature(type(generator).forward).parameters)[1:]
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    keep, given = kwargs.get("logits_to_keep", 0), {}
    one = not isinstance(keep, Tensor) and keep == 1
    for name in ("labels", "shift_labels"):
        if isinstance(kwargs.get(name), Tensor):
            given[name] = _own(generator, kwargs[name])
    some = isinstance(keep, Tensor) or keep != 0
    wanted = not one and (always or bool(given) or generator.training or some)
    counted = kwargs.get("num_items_in_batch") is not None
    labels, shifted = given.get("labels"), given.get("shift_labels")
    _ASK.set(Ask(generator.model, wanted, keep, labels, shifted, counted))
    return args, {**kwargs, **given}


def _own(generator: Any, labels: Tensor) -> Tensor:
    """A copy of ``labels`` to write into, where accelerate will not make another one of it."""
    device = getattr(getattr(generator, "_hf_hook", None), "execution_device", None)
    return labels.clone() if device is None else labels.to(device, copy=True)


def place(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook on the inner model: note what is left, and put it at the caller's columns where that is wanted."""
    step, asked = kwargs.get(KEYWORD), _ASK.get()
    hidden: Tensor = output[0]
    if step is None:
        cache = cache_in(kwargs)
        if cache is not None and int(cache.get_seq_length()) > hidden.shape[1]:
            return None  # a later step of a prompt without visual tokens
        kept = Kept(*hidden.shape[:2], hidden.device)
    else:
        kept = Kept.of(step.run)
    _LAST.kept[inner] = kept
    _note(output, kept)
    mine = asked if asked is not None and asked.inner is inner else None
    if mine is not None:
        mine.kept = kept
    if step is None or not step.prefill or kept.index is None or mine is None:
        return None
    _ignore_dropped(mine, kept)
    if not mine.wanted:
        return None
    hidden = kept.expand(hidden)
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


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


def _ignore_dropped(asked: Ask, kept: Kept) -> None:
    """Write -100 to the labels of dropped columns, in the copies that the model goes on with.

    Raises ``ValueError`` for labels of other columns than those of the logits.
    """
    gone = kept.slots < 0
    following = torch.cat([gone[:, 1:], torch.zeros_like(gone[:, :1])], 1)
    for labels, ignored in ((asked.labels, gone), (asked.shifted, following)):
        if labels is None:
            continue
        ignored = _picked(ignored, asked.keep).to(labels.device)
        if labels.shape != ignored.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for logits at {tuple(ignored.shape)} columns: give labels of "
                f"the {kept.length} columns of the prompt, or of those that logits_to_keep names (labels[:, -n:] "
                f"with logits_to_keep=n)"
            )
        if asked.counted and bool((ignored & (labels != -100)).any()):
            warnings.warn(
                "labels of visual tokens that were dropped do not count in the loss, but num_items_in_batch counts "
                "them; set the labels of image and video placeholders to -100",
                stacklevel=2,
            )
        labels.masked_fill_(ignored, -100)


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
        return kept.pair()
    kept = getattr(source, _KEPT, None)
    if kept is None:
        cache = next(
            (c for c in (getattr(source, n, None) for n in ("cache", "past_key_values")) if c is not None), None
        )
        run = None if cache is None else run_of(cache)
        if run is None:
            raise ValueError(
                f"this {type(source).__name__} does not say which columns were kept: give the output object of a "
                f"patched image/video language model (return_dict=True, uncopied), or the model after its forward"
            )
        kept = Kept.of(run)
    return kept.pair()
