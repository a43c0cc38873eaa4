"""Tensors that come in pairs. Plain tuples of the same order are taken wherever one of these is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Joint", "PoolingHead", "Through"]

#: How every tensor of a pair is cut.
Cut = Callable[[Tensor], Tensor]


class Joint(NamedTuple):
    """Patches (B,N,E) and the question (B,M,E) in the joint space of a CLIP model; rows of text that are not there are
    zero."""

    patches: Tensor
    text: Tensor

    def cut(self, patches: Cut, text: Cut) -> Joint:
        return Joint(patches(self.patches), text(self.text))


class PoolingHead(NamedTuple):
    """What the pooling head of a tower attends to, (B*V,n), and the vector (B*V,C) that it makes."""

    attention: Tensor
    vector: Tensor

    def cut(self, rows: Cut) -> PoolingHead:
        return PoolingHead(rows(self.attention), rows(self.vector))


class Through(NamedTuple):
    """What enters the projector, (B,N,E) of tokens behind the prefix, and the projector as a function."""

    rows: Tensor
    project: Callable[[Tensor], Tensor]

    def cut(self, rows: Cut) -> Through:
        return Through(rows(self.rows), self.project)
