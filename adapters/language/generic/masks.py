"""Masks of a discovered model's calls, for the columns that are left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.cuts import Cut
from tokenreduce.adapters.language.masks import gather_mask, lowest_of

__all__ = ["prompt_mask", "turn_mask"]


def prompt_mask(mask: Any, cut: Cut, batch: int, length: int) -> Any:
    """What the caller gave as mask of a prompt of L columns, (B,L), (B,1,L,S) or one such per layer type, at the K
    columns that are left. None is a mask of ones: without one, positions with gaps look like several sequences."""
    if isinstance(mask, dict):
        return {name: prompt_mask(m, cut, batch, length) if m is not None else None for name, m in mask.items()}
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.long, device=cut.columns.at.device)
    if mask.dim() == 4:  # for a static cache, whose slots behind the prompt are empty
        _check_width(mask, length)
        return gather_mask(mask, cut.columns, mask.shape[-1])
    out = mask.expand(batch, -1).gather(1, cut.columns.at.to(mask.device))
    return out if cut.columns.there is None else out.masked_fill(~cut.columns.there.to(mask.device), 0)


def turn_mask(mask: Any, columns: Columns, new: int, past: int, static: bool = False) -> Any:
    """The same of a call that brings ``new`` tokens behind ``past`` columns, dropped ones included; ``static`` says
    that the cache shows all its slots, filled or not."""
    if isinstance(mask, dict):
        return {name: None if m is None else turn_mask(m, columns, new, past, static) for name, m in mask.items()}
    cut = columns.cut_at(-1)
    assert cut is not None
    batch = len(cut.columns.at)
    if mask is None:
        if cut.columns.there is None:
            return None
        mask = torch.ones(batch, past + new, dtype=torch.long, device=cut.columns.at.device)
    held = columns.of_slots(-1, cut.k + past + new - columns.length)
    at, there = held.at, held.real()
    if mask.dim() == 2:
        out = mask.expand(batch, -1).gather(1, at.to(mask.device))
        return out.masked_fill(~there.to(mask.device), 0)
    _check_width(mask, past + new)
    full = mask.expand(batch, -1, -1, -1)
    where = at[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1)
    lowest = lowest_of(full)
    out = full.gather(3, where).masked_fill(~there[:, None, None, :], lowest)
    rest = mask.shape[-1] - out.shape[-1] if static else 0
    return torch.cat([out, out.new_full((*out.shape[:3], rest), lowest)], 3) if rest > 0 else out


def _check_width(mask: Tensor, columns: int) -> None:
    if mask.shape[-1] < columns:
        raise ValueError(
            f"attention_mask (batch, 1, tokens, slots) has {mask.shape[-1]} slots for {columns} columns, as masks of "
            f"static caches with windows shorter than the prompt have; use a dynamic cache"
        )
