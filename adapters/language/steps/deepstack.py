"""DeepStack (Qwen3-VL): features that the language model adds to all visual columns, some of which may be gone.

Those that come after the first layer that may have fewer columns are taken from the language model, and added here, to
the columns that are left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenreduce.adapters.language.generation import KEYWORD, Deep, Step
from tokenreduce.adapters.language.site import LayerCall, LayerStep
from tokenreduce.core.undo import Undo

__all__ = ["AddDeepstack", "attach_deepstack"]


@dataclass(frozen=True)
class AddDeepstack(LayerStep):
    """Add the features that belong in front of this layer; ``cut_before``: columns went in the middle of the layer
    before."""

    cut_before: bool = False

    def before(self, call: LayerCall) -> None:
        if call.step.prefill and call.step.deep is not None:
            since = call.index if self.cut_before else call.index - 1
            call.x = call.step.deep.add(call.x, call.index, call.run.cut_at(since))


def attach_deepstack(text: nn.Module, first: int, undo: Undo) -> None:
    """Let the language model ``text`` add features up to layer ``first`` only, to layer 0 where columns go before
    it."""
    undo.pre_hook(text, functools.partial(take_deep, first=first))


def take_deep(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model."""
    step: Step | None = kwargs.get(KEYWORD)
    features = kwargs.get("deepstack_visual_embeds")
    if step is None or not step.prefill or features is None:
        return None
    first = first if step.run.cut_at(-1) is None else 0
    if len(features) <= first:
        return None
    mine = {i + 1: features[i] for i in range(first, len(features))}
    deep = Deep(kwargs["visual_pos_masks"], mine)
    return args, {**kwargs, "deepstack_visual_embeds": features[:first], KEYWORD: replace(step, deep=deep)}
