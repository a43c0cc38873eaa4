"""The features that ``get_image_features`` and ``get_video_features`` return, as rows, and outputs with fewer of them.

Families return one tensor per image, per row of the batch or per tile, or a single one, in ``pooler_output`` or, before
the projector, in ``last_hidden_state``; beside them may stand as many rows for later layers (DeepStack).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FIELDS", "Features", "lengths_of", "read", "rows_in"]

FIELDS = ("pooler_output", "last_hidden_state")
#: Fields that tell of the tower's layers, and of no token of the language model.
_OTHER = ("hidden_states", "attentions")


@dataclass(frozen=True)
class Features:
    """One kind's ``output``, whose ``field`` holds the ``rows`` (N,C) that placeholders stand for, in their order."""

    kind: str
    output: Any
    field: str
    rows: Tensor

    def cut(self, keep: Tensor, rows: Tensor) -> Any:
        """A copy of the output with the rows ``keep`` (K,), ascending, of everything that has as many as placeholders;
        ``rows`` (K,C) are the features there."""
        out = copy.copy(self.output)
        n = len(self.rows)
        for name, value in list(self.output.items()):
            if name == self.field:
                out[name] = _fewer(value, keep, rows)
            elif name not in _OTHER and _rows(value) == n:
                out[name] = _fewer(value, keep, None)
            elif name not in _OTHER and isinstance(value, list | tuple) and value and all(_rows(v) == n for v in value):
                out[name] = type(value)(_fewer(v, keep, None) for v in value)
        return out


def read(kind: str, output: Any, count: int) -> Features:
    """The features in ``output`` that fill ``count`` placeholders. Raises ``ValueError`` where none do."""
    seen = []
    for name in FIELDS:
        value = getattr(output, name, None)
        number = _rows(value)
        if number == count:
            return Features(kind, output, name, rows_in(value))
        seen += [] if number is None else [f"{number} in {name}"]
    raise ValueError(
        f"the prompt has {count} places for {kind} features, and get_{kind}_features of the model made "
        f"{', '.join(seen) or 'none'}; as many are needed, patched or not: let the model's processor make the prompt"
    )


def rows_in(value: Any) -> Tensor:
    """(N,C) of a tensor or of a list of them."""
    parts = [v.flatten(0, -2) for v in _parts(value)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lengths_of(value: Any) -> list[int]:
    """Rows of every image as far as the output's form tells: of every tensor of a list, of every first index."""
    if isinstance(value, Tensor):
        return [value[0].numel() // value.shape[-1]] * len(value) if value.dim() > 2 and len(value) else [len(value)]
    return [v.numel() // v.shape[-1] for v in value]


def _parts(value: Any) -> Iterator[Tensor]:
    yield from [value] if isinstance(value, Tensor) else value


def _rows(value: Any) -> int | None:
    """Rows of a tensor (...,C) or of a list of such tensors, None for anything else."""
    if isinstance(value, Tensor):
        return value.numel() // value.shape[-1] if value.dim() > 1 and value.shape[-1] else None
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(v, Tensor) and v.dim() > 1 for v in value)
    ):
        return None
    return sum(v.numel() // max(v.shape[-1], 1) for v in value)


def _fewer(value: Any, keep: Tensor, rows: Tensor | None) -> Any:
    """``value`` with ``rows`` (K,C) in place of its own ``keep``, in the form that its readers count on: a list of as
    many tensors, or one tensor of as many dimensions."""
    taken = rows_in(value).index_select(0, keep.to(next(_parts(value)).device)) if rows is None else rows
    if isinstance(value, Tensor):
        return taken if value.dim() == 2 else taken.view(*[1] * (value.dim() - 2), *taken.shape)
    ends = torch.tensor([v.numel() // v.shape[-1] for v in value], device=keep.device).cumsum(0)
    counts = torch.searchsorted(keep, ends).diff(prepend=keep.new_zeros(1)).tolist()
    parts = taken.split(counts)
    return type(value)(parts) if type(value) in (list, tuple) else list(parts)
