"""Rotary tables of cached slots and of positions to come, for methods that undo a rotation."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.state import Record
from tokenreduce.core.evidence import Rotary
from tokenreduce.core.plan import take

__all__ = ["PromptPositions", "Turning", "rows_of", "turning_of"]


@dataclass
class PromptPositions(Record):
    """Positions ``ids`` (B or 1,L) or (3 or 4,B,L) of the prompt's columns, of a forward whose methods ask for rotary
    tables."""

    ids: Tensor


def rows_of(table: Tensor, where: Tensor) -> Tensor:
    """Rows of ``table`` (B or 1,L,d) at the columns ``where`` (B,K); (3,B,L,d) where layers mix M-RoPE themselves, as
    in early releases."""
    if table.dim() == 4:
        return torch.stack([rows_of(t, where) for t in table])
    if table.shape[0] == 1:  # one table for all rows; whole rows are copied much faster than numbers are gathered
        return table[0].index_select(0, where.flatten()).unflatten(0, where.shape)
    return take(table, where)


@dataclass(frozen=True)
class Turning:
    """The rotary module of a language model."""

    module: nn.Module
    paired: bool
    #: What else the module wants to know.
    more: dict[str, Any] = field(default_factory=dict)

    def of(self, forward: Forward, index: int, x: Tensor) -> Rotary | None:
        """Tables of the slots of layer ``index`` at the prompt; None behind it."""
        known, columns = forward.state.get(PromptPositions), forward.columns
        if not forward.prefill or known is None or columns.front:
            return None
        positions, b = known.ids, len(columns.visual)
        cut = columns.cut_at(index)
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
    return Turning(module, _paired(layer.self_attn), more)


def _paired(attention: Any) -> bool:
    """Whether neighbouring channels turn together in the rotation of ``attention``, and not the two halves: tried on
    four numbers. Raises ``ValueError`` where its file rotates in no way that is known."""
    found = vars(sys.modules[type(attention).__module__])
    turned = {tuple(found[name](torch.arange(4.0)).tolist()) for name in found if name.startswith("rotate_half")}
    if turned == {(-2.0, -3.0, 0.0, 1.0)}:
        return False
    if turned == {(-1.0, 0.0, -3.0, 2.0)}:
        return True
    raise ValueError(
        f"how {type(attention).__name__} rotates its keys is not known, so that a method cannot undo it; choose snapkv "
        f"or knorm"
    )
