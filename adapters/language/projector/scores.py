"""Scores that language-stage methods make of the vision tower's evidence, which the language model does not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.families import TOWER
from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.projector.images import found_in
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import Look
from tokenreduce.core.reducer import Reducer

__all__ = ["needs_scores", "scores_of"]


def needs_scores(reducer: Reducer) -> bool:
    """Whether a language-stage method looks at the vision tower."""
    return any(need in TOWER for need in reducer.required())


@dataclass(frozen=True)
class _Looking(Projector):
    """Stands for ``method`` where images are gathered, and asks for what it looks at."""

    method: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", self.method.name)  # for messages

    def tower_blocks(self) -> tuple[Look, ...]:
        looks: tuple[Look, ...] = self.method.tower_blocks()
        return looks


def scores_of(forward: Forward, x: Tensor, reducer: Reducer) -> Tensor:
    """(B,L) float32: the scores of ``reducer`` in the images of a prompt with embeddings ``x`` (B,L,D), each view
    alone; 0 for text, row ends, and copies of what a method in the tower merged.

    Raises ``ValueError`` for image features that were made elsewhere, so that nobody knows what the tower saw.
    """
    out = torch.zeros(x.shape[:2], device=x.device)
    for group in found_in(forward, x, _Looking(method=reducer)).groups:
        for where, part in group.evidence.parts():
            columns = group.views.columns[:, where].flatten(0, 1)
            out[group.views.rows.repeat_interleave(len(where), 0), columns] = reducer.tower_scores(part).float()
    return out
