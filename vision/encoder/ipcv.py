"""IPCV (arXiv 2512.18747): drop patches that a block changes little, and rebuild them behind the last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.neighbours import nearest_slots
from tokenreduce.algorithms.scoring import select
from tokenreduce.core.budget import check_count, check_keep, count
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune, Rebuild
from tokenreduce.core.reducer import Reducer

__all__ = ["IPCV"]


@dataclass(frozen=True)
class IPCV(Reducer, name="ipcv", needs=("before",), paper="2512.18747", title="IPCV", position="before"):
    """IPCV: patches that the block before changed least go, and come back behind the last block, so that whatever
    stands behind the tower gets all of them.

    In front of block ``layer`` a patch scores by how far the block before moved it (Euclidean norm); the highest stay.
    A patch that went is rebuilt, when it is needed, as it was plus the mean change since then of its ``top_k`` nearest
    neighbours among those that stayed (Euclidean distance of what enters ``layer``; all of them where fewer stayed).
    In the first ``as_layer`` blocks attention is over all patches, rebuilt for it, and the MLP runs on those that
    stayed; in later blocks both do. Positions stay. In packed towers (Qwen's) single patches go, not merge units, and
    what reads tokens between two blocks (DeepStack, features of a layer before the last) gets them rebuilt. Only the
    tower becomes cheaper: combine it with a method before or inside the language model.

    Args:
        layer: 0-based block in front of which patches go, at least 2 as in the official code.
        keep: patches that stay, a count or a ratio (rounded down, at least 1), of an image or of all, see ``per``.
        as_layer: blocks from ``layer`` on whose attention is over all patches; 0 for none.
        top_k: neighbours that a patch is rebuilt from.
        per: "image" chooses, and looks for neighbours, in every image (view, frame) by itself, so that a batch is what
            its images are alone; "all" does over all patches of a call of the tower together, as the official code,
            which is the same for one image. One of several images may then lose all its patches, and samples of a batch
            are padded.

    Different from the official code: ``per="image"`` is the default, and a patch that is the first of its frame counts
    to it, not to the frame before (an error of one in ``cu_seqlens`` there). Class tokens and registers stay, and are
    nobody's neighbours. Of equal scores and distances the lower index counts.

    Raises ``ValueError`` for other values and where the tower has no block ``layer``.
    """

    ragged: ClassVar[bool] = True
    rebuilds: ClassVar[bool] = True
    first_block: ClassVar[int] = 2

    layer: int = 3
    keep: int | float = 0.35
    as_layer: int = 7
    top_k: int = 10
    per: Literal["image", "all"] = "image"

    def __post_init__(self) -> None:
        check_count(self.layer, "layer", self.first_block)
        check_keep(self.keep)
        check_count(self.as_layer, "as_layer")
        check_count(self.top_k, "top_k", 1)

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.layer >= depth:
            fits = f"give a layer from 2 to {depth - 1}" if depth > 2 else "choose one that names no block (tome, evit)"
            raise ValueError(
                f"layer={self.layer}: {self.name} cannot act there, the model has blocks 0 to {depth - 1}; {fits}"
            )
        return layer == self.layer

    def plan(self, evidence: EncoderEvidence) -> Plan:
        free = evidence.free()
        if evidence.valid is None and count(self.keep, free, "down") >= free:
            return Identity.like(evidence.x)
        x = evidence.x.detach().float()
        change = torch.linalg.vector_norm(x - evidence.before.detach().float(), dim=-1)
        chosen = self._chosen(change, evidence)
        if chosen is None:
            return Identity.like(evidence.x)
        fixed = evidence.fixed()
        k = min(self.top_k, chosen.k - (evidence.n - free))
        near = nearest_slots(x, chosen, None if fixed is None else fixed.gather(1, chosen.keep), k)
        return Rebuild(evidence.n, chosen.keep, chosen.valid, anchor=evidence.x, near=near)

    def _chosen(self, change: Tensor, evidence: EncoderEvidence) -> Prune | None:
        """Which tokens stay, None where all do; every sample of a batch with padding has its own number."""
        n, free = evidence.n, evidence.free()
        if evidence.valid is None:
            return Prune(n, select(change, count(self.keep, free, "down"), evidence))
        fixed = evidence.fixed()
        there = evidence.valid if fixed is None else evidence.valid & ~fixed
        numbers = [count(self.keep, int(t), "down") for t in there.sum(1)]
        if all(k == int(t) for k, t in zip(numbers, there.sum(1), strict=True)):
            return None
        lead = n - free
        order = select(change, max(numbers), evidence, by_score=True)
        limit = torch.tensor(numbers, device=change.device)[:, None] + lead
        valid = torch.arange(order.shape[1], device=change.device) < limit
        keep, at = torch.where(valid, order, n).sort(1)  # slots that are not there come last
        valid = valid.gather(1, at)
        return Prune(n, torch.where(valid, keep, 0), None if bool(valid.all()) else valid)
