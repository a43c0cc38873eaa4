"""DeepStack (Qwen3-VL): features that the language model adds to all visual columns, some of which may be gone.

Those that come after the first layer that may have fewer columns are taken from the language model, and added here, to
the columns that are left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.generation import KEYWORD, Forward
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.adapters.language.state import Record
from tokenreduce.core.undo import Undo

__all__ = ["AddDeepstack", "attach_deepstack"]


@dataclass
class Deep(Record):
    """Visual features (n_visual,C) that are added before a layer, for the layers behind a cut.

    ``mask`` (B,L) marks their columns; ``features[layer]`` are in the order of its True entries.
    """

    mask: Tensor
    features: dict[int, Tensor]

    def add(self, x: Tensor, layer: int, cut: Cut | None) -> Tensor:
        """``x`` (B,N,C) with the features of ``layer`` added to the visual tokens that ``cut`` left."""
        rows = self.features.get(layer)
        if rows is None:
            return x
        here = self.mask.to(x.device)
        number = (here.flatten().cumsum(0) - 1).clamp(min=0).view_as(here)
        if cut is not None:
            here, number = here.gather(1, cut.here), number.gather(1, cut.here)
        return torch.where(here.unsqueeze(-1), x + rows.to(x.device, x.dtype)[number], x)


@dataclass(frozen=True)
class AddDeepstack(LayerStep):
    """Add the features that belong in front of this layer; ``cut_before``: columns went in the middle of the layer
    before."""

    rests = True

    cut_before: bool = False

    def before(self, call: LayerCall) -> None:
        deep = call.forward.state.get(Deep)
        if call.prefill and deep is not None:
            since = call.index if self.cut_before else call.index - 1
            call.x = deep.add(call.x, call.index, call.columns.cut_at(since))


def attach_deepstack(text: nn.Module, first: int, undo: Undo) -> None:
    """Let the language model ``text`` add features up to layer ``first`` only, to layer 0 where columns go before
    it."""
    undo.pre_hook(text, functools.partial(take_deep, first=first))


def take_deep(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model."""
    forward: Forward | None = kwargs.get(KEYWORD)
    features = kwargs.get("deepstack_visual_embeds")
    if forward is None or not forward.prefill or features is None:
        return None
    first = first if forward.columns.cut_at(-1) is None else 0
    if len(features) <= first:
        return None
    mine = {i + 1: features[i] for i in range(first, len(features))}
    forward.state.put(Deep(kwargs["visual_pos_masks"], mine))
    return args, {**kwargs, "deepstack_visual_embeds": features[:first]}
