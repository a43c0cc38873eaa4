"""What enters a projector for every token, and the projector as a function, for methods that ask how it answers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.families import Vision
from tokenreduce.adapters.language.projector.seen import WATCHING, Encoded
from tokenreduce.core.undo import Undo

__all__ = ["attach_through", "entering", "projection", "through_of"]


def through_of(inner: Any, kind: str, projector: nn.Module | None) -> tuple[nn.Module | None, int]:
    """The module that makes a token of what the tower gives for it, and how many rows of its input that is; None where
    tokens are mixed in there, or made before or behind it."""
    if kind == "packed":
        return getattr(inner.visual, "merger", None), inner.visual.spatial_merge_size**2
    if kind == "shuffled" and type(inner).__name__ == "InternVLModel":
        return inner.multi_modal_projector, 1
    return projector, 1


def attach_through(vision: Vision, undo: Undo) -> None:
    """Keep what enters the projector in every call that is watched."""
    if vision.through is not None:
        undo.pre_hook(vision.through, _watch)


def _watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen = WATCHING.get()
    if seen is not None:
        seen.entered = args[0] if args else next(iter(kwargs.values()))


def entering(seen: Encoded) -> Tensor:
    """(M,E) what entered the projector for every token of a call, in the order of its patches or tokens.

    Raises ``ValueError`` where these are not one for each token.
    """
    assert seen.entered is not None
    x = seen.entered.detach().flatten(0, -2)
    if seen.vision.kind != "packed":
        return x
    x = x.reshape(-1, seen.vision.unit * x.shape[-1])
    index = seen.tower_kwargs.get("window_index")
    if len(x) != sum(e.origin.n for e in seen.entries):
        raise ValueError(
            "what enters the merger is not known for every token, because a method acts in the vision tower; leave one "
            "of them out"
        )
    return x if index is None else x[index.to(x.device).argsort()]


def projection(vision: Vision) -> Callable[[Tensor], Tensor]:
    """The projector on rows (...,E), one for each token, to embeddings (...,D): in float32 whatever its weights are,
    and without the hooks on it."""
    assert vision.through is not None
    bare = copy.copy(vision.through)
    for hooks in (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        object.__setattr__(bare, hooks, OrderedDict())
    tensors = [*bare.named_parameters(), *bare.named_buffers()]
    wide = {name: t.detach().float() if t.is_floating_point() else t for name, t in tensors}
    unit = vision.unit

    def call(rows: Tensor) -> Tensor:
        flat = rows.float().flatten(0, -2)
        if vision.kind == "packed":
            flat = flat.reshape(len(flat) * unit, -1)
        with torch.autocast(rows.device.type, enabled=False):
            out: Tensor = torch.func.functional_call(bare, wide, (flat,))
        return out.reshape(*rows.shape[:-1], out.shape[-1])

    return call
