"""AdaptVision's reduction (arXiv 2408.16986): tiles enter the language model with a quarter of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, share
from tokenreduce.algorithms.views import ranks, rooms
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Identity, Merge, Plan

__all__ = ["AdaptVision"]


@dataclass(frozen=True)
class AdaptVision(Projector, name="adaptvision", paper="2408.16986", title="AdaptVision's pooling of tiles"):
    """AdaptVision: the overview of an image keeps its tokens, four of a crop become one.

    The four are consecutive ones of a crop in raster order, strips of 1x4 that may reach across a row's end, as
    published, or blocks of 2x2. The trained layer that maps four tokens to one in the paper is their mean here; its
    second tower, tile labels and tuning are left out, so that this is the token budget of the method and not its
    accuracy. An image of one view is its own overview. How many tiles an image gets is
    :func:`tokenreduce.algorithms.tiling.partition`. Outputs stand at the place of their first token, in that order;
    what is left over at the end of a crop is averaged alone.

    Args:
        cell: "strip" or "square".
        keep: None, the default, is the published number; else tokens that stay of an image: the overview's as far as
            there is room, the rest shared out evenly among crops, each cut into so many strips of consecutive tokens,
            which are as long as each other to within one. An extension, for "strip".
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for row ends among the tokens (``newlines="rank"``).
    """

    whole: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    cell: Literal["strip", "square"] = "strip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.cell != "strip":
            raise ValueError("keep is for cell='strip'; squares have four tokens each")

    @property
    def by_view(self) -> bool:
        return True

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        view, p = evidence.view, evidence.prefix
        if bool((view < 0).any()):
            raise ValueError(f"{self.name} joins tokens of one view, and row ends are in none; give newlines='keep'")
        if self.keep is None and evidence.crops is None:
            return Identity.like(evidence.x)
        part = self._parts(evidence, keep)
        cell = torch.where(part < 0, -1, view * (int(part.max()) + 1) + part)
        # Outputs are numbered by their first tokens, which is what they stand for.
        number = {c: p + i for i, c in enumerate(dict.fromkeys(c for c in cell.tolist() if c >= 0))} | {-1: -1}
        assign = torch.tensor([*range(p), *(number[c] for c in cell.tolist())], device=evidence.x.device)
        left = p + len(number) - 1
        if left == evidence.n:
            return Identity.like(evidence.x)
        return Merge.from_assignment(assign.expand(evidence.batch, -1), left, by_size=False)

    def _parts(self, evidence: VisualEvidence, keep: int) -> Tensor:
        """(N,) which output of its view every token is part of, -1 for none."""
        view, sizes = evidence.view, rooms(evidence)
        rank = ranks(torch.zeros(1, len(view), device=view.device), view)[0]
        if self.keep is not None:
            first = min(keep, int(sizes[0])) if len(sizes) > 1 else keep
            outputs = torch.tensor([first, *share(keep - first, sizes[1:].tolist())], device=view.device)[view]
            return torch.where(outputs > 0, rank * outputs // sizes[view], -1)
        if self.cell == "strip":
            return torch.where(view == 0, rank, rank // 4)
        row, column = evidence.place.unbind(1)
        return torch.where(view == 0, rank, row // 2 * (int(column.max()) + 1) + column // 2)
