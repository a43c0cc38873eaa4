"""Rotary tables of cached slots and of positions to come, for methods that undo a rotation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.generation import Step
from tokenreduce.core.evidence import Rotary

__all__ = ["Turning", "turning_of"]

#: Attentions in whose rotation neighbouring channels turn together.
_PAIRED = ("Glm", "Cohere", "Ernie", "Helium", "Llama4")


@dataclass(frozen=True)
class Turning:
    """The rotary module of a language model."""

    module: nn.Module
    paired: bool
    #: What else the module wants to know.
    more: dict[str, Any] = field(default_factory=dict)

    def of(self, step: Step, cache: Any, index: int, x: Tensor) -> Rotary | None:
        """Tables of the slots of layer ``index`` at the prompt; None behind it."""
        positions = step.positions
        if not step.prefill or positions is None or step.run.front:
            return None
        b = len(step.run.visual)
        cut = step.run.cut_at(index)
        if positions.dim() == 3 and positions.shape[0] == 4:  # the first row counts text
            positions = positions[1:]
        here = positions.expand(*positions.shape[:-2], b, -1)
        last = here.amax(-1) if here.dim() == 2 else here.amax((0, -1))
        if cut is not None:
            at = cut.here if here.dim() == 2 else cut.here.expand(here.shape[0], -1, -1)
            here = here.gather(-1, at)
        cos, sin = (_rows(t) for t in self.module(x, here, **self.more))

        def ahead(count: int) -> tuple[Tensor, Tensor]:
            new = last[:, None] + 1 + torch.arange(count, device=x.device)
            made = self.module(x, new if here.dim() == 2 else new.expand(here.shape[0], -1, -1), **self.more)
            return _rows(made[0]), _rows(made[1])

        return Rotary(cos, sin, ahead, self.paired)


def _rows(table: Tensor) -> Tensor:
    """(B,N,r). Raises ``ValueError`` for tables of several axes that layers mix, as in early releases."""
    if table.dim() == 4:
        raise ValueError(
            "this release of transformers mixes M-RoPE inside its layers, where a method cannot undo the rotation; use "
            "transformers 5.20 or newer, or another method, such as snapkv"
        )
    return table


def turning_of(text: nn.Module, layer: Any) -> Turning:
    """Raises ``ValueError`` for a language model whose rotary tables are made elsewhere."""
    module = getattr(text, "rotary_emb", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{type(text).__name__} has no rotary tables of its own, which this method undoes; choose snapkv or knorm"
        )
    kinds = getattr(text.config, "layer_types", None)
    wants = "layer_type" in inspect.signature(module.forward).parameters
    more = {"layer_type": kinds[layer.self_attn.layer_idx]} if wants and kinds else {}
    return Turning(module, type(layer.self_attn).__name__.startswith(_PAIRED), more)
