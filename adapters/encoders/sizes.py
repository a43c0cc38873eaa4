"""How log sizes reach the kernel of fused attention: as a mask, or folded into a channel of the keys.

A merged token counts as often as it has members, which adds the logarithm of its size to the logits of its key
(arXiv 2210.09461). As a mask (B,1,1,N) that rules out kernels which take none (FlashAttention). Folded, keys get
channels that hold the logarithm and queries the same number in all of them, so that the product is in the logits
already: exactly what was asked, for a head that is 8 channels wider. The numbers are split into two channels, high and
low part, since one of half precision would round them.

The form is read when a model is patched: ``with sizes_as("key"): tr.patch(model, "tome:r=16")``. Attention that is not
fused, that adds a bias of its own to every pair (relative positions), and towers that pack several images into one row
keep the mask, with the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.core.undo import Undo

__all__ = ["FORMS", "Folded", "fold", "folds", "note_form", "sized_attention", "sizes_as"]

#: "mask": a bias on the logits. "key": channels of the keys.
FORMS = ("mask", "key")
#: Kernels want rows of a multiple of 16 bytes: 8 numbers of half precision.
WIDTH = 8
#: Stands for -inf, by which a product with a zero channel would be NaN; its exponential is 0 beside any logit.
NOTHING = -30_000.0
_ON_MODULE = "_tokenreduce_sizes"
_form: ContextVar[str] = ContextVar("tokenreduce_sizes", default="mask")


@contextmanager
def sizes_as(form: str) -> Iterator[None]:
    """Models patched inside take sizes in this form, one of :data:`FORMS`. Raises ``ValueError`` for another one."""
    if form not in FORMS:
        raise ValueError(f"sizes go into attention as one of {', '.join(FORMS)}, not {form!r}")
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def note_form(attn: nn.Module, undo: Undo) -> None:
    """Note on an attention module that is being patched how it takes sizes, where that is not a mask."""
    if _form.get() != "mask":
        undo.set(attn, _ON_MODULE, _form.get())


def folds(attn: Any, bias: Any) -> bool:
    """Whether ``attn`` folds ``bias`` into its keys: it was told to, and there is one number (B,1,1,N) for each key."""
    if attn.__dict__.get(_ON_MODULE) != "key":
        return False
    return isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[1] == bias.shape[2] == 1


class Folded(NamedTuple):
    """Queries, keys and values (B,H,N,d+8), the ``scale`` of their logits, and ``width`` d: how many channels of the
    output are meant."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    width: int


def fold(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Folded:
    """Queries, keys, values (B,H,N,d) with ``bias`` (B,1,1,N) inside the keys; ``scale`` is that of the logits,
    1/sqrt(d) by default. -inf in ``bias`` stands for keys that are not there."""
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    power = 2.0 ** round(math.log2(1 / scale))  # a number that every dtype has, about 1/scale
    wanted = (bias.float() / (scale * power)).clamp_min(NOTHING).transpose(-1, -2)  # (B,1,N,1)
    high = wanted.to(k.dtype)
    low = (wanted - high.float()).to(k.dtype)
    room = [*k.shape[:-1], 1]
    more = -(width + 2) % WIDTH + 2
    ones = q.new_full((*q.shape[:-1], 2), power)
    return Folded(
        F.pad(torch.cat([q, ones], -1), (0, more - 2)),
        F.pad(torch.cat([k, high.expand(room), low.expand(room)], -1), (0, more - 2)),
        F.pad(v, (0, more)), scale, width,
    )  # fmt: skip


def sized_attention(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, drop: float = 0.0, scale: float | None = None
) -> Tensor:
    """Fused attention (B,H,N,d) of the module ``attn`` with a bias on its logits, in the form that it was told."""
    if bias is None or _ON_MODULE not in attn.__dict__ or not folds(attn, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=scale)
    assert bias is not None
    made = fold(q, k, v, bias, scale)
    out = F.scaled_dot_product_attention(made.q, made.k, made.v, dropout_p=drop, scale=made.scale)
    return out[..., : made.width]
