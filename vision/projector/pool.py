"""Average pooling before the language model: neighbouring tokens become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenreduce.algorithms.baseline import cells_of
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Merge, Plan

__all__ = ["PoolTokens"]


@dataclass(frozen=True)
class PoolTokens(Projector, name="pool", title="Average pooling before the language model"):
    """Pool: every view is cut into cells, and the plain mean of a cell's embeddings replaces its tokens.

    The cells are exactly as many as tokens shall stay. They lie in bands of rows: as many bands as make the cells
    nearest to squares, rows shared out evenly among bands and cells evenly among bands (the first bands take the
    rest), columns evenly among the cells of a band. Where K is the number of k x k blocks that tile the grid, this is
    k x k average pooling. Tokens that are not there (cut-off padding, corners of a shape) leave their cells smaller.
    An output stands at the place of its cell's first token in raster order, and outputs follow in that order.

    Args:
        keep: visual tokens of every image that stay, a count or a ratio; 0.25 without it and ``kernel``.
        kernel: the side of a cell or its (rows, columns). Without ``keep`` one token in rows * columns stays, which is
            ordinary pooling where the kernel divides the grid; with it only the shape of cells follows.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for bad settings, and for tokens of one view that share a place (frames without views of their
    own).
    """

    keep: int | float | None = None
    kernel: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kernel, Sequence) and not isinstance(self.kernel, str):
            object.__setattr__(self, "kernel", tuple(self.kernel))
        if isinstance(self.kernel, tuple) and len(self.kernel) != 2:
            raise ValueError(f"kernel is a number of rows and columns, or a pair of them, not {self.kernel!r}")
        rows, cols = self._sides()
        for side in (rows, cols):
            check_count(side, "kernel", 1)
        if self.keep is None:
            object.__setattr__(self, "keep", 0.25 if self.kernel is None else 1 / (rows * cols))
        super().__post_init__()

    def _sides(self) -> tuple[int, int]:
        if self.kernel is None:
            return 1, 1
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        places = [(r, c) for r, c in evidence.place.tolist()]
        if len(set(places)) < len(places):
            raise ValueError(f"{self.name} needs one token in a place: give every frame as a view of its own")
        rows, cols = self._sides()
        cell = cells_of(places, keep, rows / cols)
        p = evidence.prefix
        # Outputs are numbered by their first tokens, which is what they stand for.
        number = {c: p + i for i, c in enumerate(dict.fromkeys(cell))}
        assign = torch.tensor([*range(p), *(number[c] for c in cell)], device=evidence.x.device)
        return Merge.from_assignment(assign.expand(evidence.batch, -1), p + keep, by_size=False)
