"""ToMe for Stable Diffusion (arXiv 2303.17604): merge for one module, and unmerge behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import mixed_seed, scramble
from tokenreduce.algorithms.destinations import in_cells, nearest, others
from tokenreduce.algorithms.scoring import descending, finite, unit
from tokenreduce.core.budget import check_count, check_either, count
from tokenreduce.core.diffusion_reducer import MODULES, DiffusionReducer
from tokenreduce.core.evidence import DiffusionEvidence
from tokenreduce.core.plan import Identity, Merge, Plan

__all__ = ["ToMeSD"]

_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class ToMeSD(DiffusionReducer, name="tomesd", stage="diffusion", paper="2303.17604", title="ToMe for Stable Diffusion"):
    """ToMe for Stable Diffusion: attention of a UNet's blocks runs on merged tokens, which are put back behind it.

    Every cell of ``sy`` x ``sx`` tokens of the feature map has one destination, drawn at random; rows and columns that
    fill no cell, and all other tokens, are sources. The r sources that are most similar to a destination, by cosine of
    what enters the block, merge into theirs: the plain mean of a destination and its sources, all of weight 1. Behind
    the module each source gets a copy of its destination's output. The residual keeps all N tokens, and the block's
    modules share one plan. Order of outputs: unmerged sources by descending similarity, destinations ascending.

    The draw is one for the whole batch, so that conditional and unconditional rows match, and none in a batch of odd
    size, where the two cannot be in one batch: the top-left token of a cell is the destination then. It is a hash of
    ``seed``, the block and the timestep: another one in each block and step, as in the official code, and the same one
    when an image is made again, on every device. The official code draws from a generator that goes on from call to
    call. Similarities are float32 here, in the model's precision there.

    The official code derives the size of a feature map from the number of its tokens; here it is the map's own, so that
    maps that are not square, or have odd sides, are cut into the right cells, and ``max_downsample`` counts the UNet's
    own downsampling. A map smaller than a cell stays whole.

    Args:
        ratio: share of a map's tokens that merge, in [0, 1), rounded down; more than there are sources
            (3/4 of all in cells of 2 x 2) is cut to these and noted.
        keep: instead of ``ratio``: tokens that a module sees, a count or a share.
        sx, sy: columns and rows of a cell.
        use_rand: False takes the top-left token of every cell.
        seed: another seed, another draw.
        max_downsample: deepest level that is merged: 1 is the latent's own size, 2 half of it, and so on. Stable
            Diffusion XL has no transformer block at level 1: give 2 there.
        merge_attn, merge_crossattn, merge_mlp: the modules that run on merged tokens: self-attention, attention to the
            text, MLP. A model is not patched for none of them.

    Raises ``ValueError`` for other values, cells of one token, and evidence without a grid.
    """

    ratio: float = 0.5
    keep: int | float | None = None
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    seed: int = 0
    max_downsample: int = 1
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is a share of tokens in [0, 1), not {self.ratio!r}")
        check_either(self.keep, self.ratio != type(self).ratio, "ratio")
        for name, least in (("sx", 1), ("sy", 1), ("seed", 0), ("max_downsample", 1)):
            check_count(getattr(self, name), name, least)
        if self.sx * self.sy < 2:
            raise ValueError("a cell of one token has nothing to merge: sx * sy is at least 2")

    def modules(self) -> tuple[str, ...]:
        wanted = (self.merge_attn, self.merge_crossattn, self.merge_mlp)
        return tuple(name for name, on in zip(MODULES, wanted, strict=True) if on)

    def acts_on(self, downsample: int) -> bool:
        return downsample <= self.max_downsample

    def plan(self, evidence: DiffusionEvidence) -> Plan:
        free = evidence.n - evidence.prefix
        r = int(free * self.ratio) if self.keep is None else free - count(self.keep, free)
        if r == 0:
            return Identity.like(evidence.x)
        h, w = self._grid(evidence, free)
        cells = (h // self.sy) * (w // self.sx)
        most = free - cells if cells else 0
        if r > most:
            why = f"{most} of {free} are sources" if cells else f"a map of {h}x{w} has no cell of {self.sy}x{self.sx}"
            evidence.note(
                f"tomesd: r={r} cut to {most} at block {evidence.layer} ({why})",
                "tomesd: some feature maps have fewer sources than are to merge; tr.record(model) notes where",
            )
            r = most
        if r == 0:
            return Identity.like(evidence.x)
        target = in_cells((h, w), (self.sy, self.sx), self._offsets(evidence, cells))
        return self._matched(evidence, others(target, free), target, r)

    def _grid(self, evidence: DiffusionEvidence, free: int) -> tuple[int, int]:
        """Rows and columns of the map. Raises ``ValueError`` where the evidence does not say them."""
        if evidence.masked or evidence.valid is not None:
            raise ValueError("tomesd works on whole feature maps: give protected as a count, and no valid")
        grid = evidence.grid
        if grid is None or len(grid) != 2 or grid[0] * grid[1] != free:
            raise ValueError(f"tomesd needs the grid (rows, columns) of the {free} tokens, and got {grid}")
        return grid[0], grid[1]

    def _offsets(self, evidence: DiffusionEvidence, cells: int) -> Tensor:
        """(cells,) the destination's place within every cell."""
        device = evidence.x.device
        if not self.use_rand or evidence.batch % 2:
            return torch.zeros(cells, dtype=torch.long, device=device)
        key: Any = mixed_seed(self.seed, evidence.layer + 1)
        if evidence.timestep is not None:
            time = torch.as_tensor(evidence.timestep, device=device).reshape(-1)[:1].float()
            key = scramble(time.view(torch.int32).long() & _BITS ^ key)
        return scramble(torch.arange(1, cells + 1, device=device) ^ key) % (self.sy * self.sx)

    def _matched(self, evidence: DiffusionEvidence, source: Tensor, target: Tensor, r: int) -> Plan:
        """The merge of the ``r`` of ``source`` (S,) that are most similar to one of ``target`` (T,)."""
        p, batch = evidence.prefix, evidence.batch
        best, partner = nearest(unit(evidence.x.detach()[:, p:]), source, target)
        order = descending(finite(best, evidence))
        merged, rest = order[:, :r], order[:, r:]
        front = torch.arange(p, device=order.device).expand(batch, p)
        keep = torch.cat([front, source[rest] + p, (target + p).expand(batch, -1)], 1)
        dst = partner.gather(1, merged) + (p + rest.shape[1])
        return Merge(evidence.n, keep, source[merged] + p, dst, by_size=False)
