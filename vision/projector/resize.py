"""Down-sampling before the language model: would a smaller picture of the same tokens have done as well?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.algorithms.baseline import cells, full_grid, resampling
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan, Pool

__all__ = ["ResizeTokens"]


@dataclass(frozen=True)
class ResizeTokens(Projector, name="resize@projector", title="Down-sampling before the language model"):
    """Resize: the embeddings of every view, seen as a picture, are down-sampled by antialiased bilinear resampling.

    Exactly as many outputs as tokens shall stay: rows of outputs as many as keep pixels nearest to squares, columns
    shared out evenly among these rows, the first ones taking the rest. Where K is rows times columns of the same
    aspect ratio, this is an ordinary resized grid. Each output stands at the place of the token nearest to its centre;
    raster order.

    Args:
        keep, positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for bad settings, and for tokens that do not fill a grid.
    """

    keep: int | float = 0.25

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        grid = full_grid(evidence) or evidence.shape
        p, n, device = evidence.prefix, evidence.n - evidence.prefix, evidence.x.device
        height, width = grid[-2:]
        if height * width != n:
            raise ValueError(f"{self.name} needs a full grid of tokens, not {n} on {grid}; pool takes any shape")
        bands = [parts for _, _, parts in cells([range(width)] * height, keep)]
        across = {parts: resampling(width, parts, device) for parts in set(bands)}
        weights = torch.block_diag(torch.eye(p, device=device), torch.cat([
            torch.kron(row[None], across[parts])
            for row, parts in zip(resampling(height, len(bands), device), bands, strict=True)
        ]))  # fmt: skip
        centres = [
            p + (2 * i + 1) * height // (2 * len(bands)) * width + (2 * j + 1) * width // (2 * parts)
            for i, parts in enumerate(bands)
            for j in range(parts)
        ]
        keeps = torch.tensor([*range(p), *centres], device=device)
        return Pool(
            evidence.n, weights.expand(evidence.batch, -1, -1), keep=keeps.expand(evidence.batch, -1).contiguous()
        )
