"""StreamMem (arXiv 2508.15717): a capped memory of video that the chat template's own tokens judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import budget, check_finite, keep_slots
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Mix, Plan

__all__ = ["StreamMem"]


@dataclass(frozen=True)
class StreamMem(CacheReducer, name="streammem", needs=("attention", "frames"), paper="2508.15717", title="StreamMem"):
    """StreamMem: after every clip, keep the visual slots that proxy queries attend to, and a mean of every new frame.

    The proxy are the tokens behind a clip that open an answer in the chat template; the question is not known yet. A
    slot's importance is their softmaxed attention over all visual slots, memory and clip together, averaged over them
    and over the query heads of a KV head. Where there are more than M slots, the best of memory and clip stay, and
    every new frame adds one prototype: the mean of its keys and of its values, weighted by importance over all its
    tokens, kept and dropped. Later, a prototype competes like any slot. Text stays.

    Args:
        keep: instead of ``M``: visual slots left, a count or a ratio, prototypes included.
        M: slots of every layer; 6000, 12000 and 24000 in the paper, for videos of 50000.
        proxy: how many of the last queries are the proxy; the template's tokens are about 5.
        heads: "kv" ranks in every KV head by itself; "all" by the mean over all heads (the paper does not say).
        merge: "weighted" prototypes, "average" ones with equal weights, or "none", the paper's ablation.
        merge_keys: whether a prototype's key is the weighted mean of rotated keys, as in the paper. False takes the key
            of its best token that was dropped, so that positions stay whole, also for M-RoPE.

    Decisions where the paper is silent: M is a layer's and counts prototypes; a prototype takes the column of the best
    dropped token of its frame; a frame that lost nothing gets none, and leaves its place to the next best slot; new
    frames are those of slots without a running score; importance is normalised within the frame, equal where all of it
    is 0. Clips of 8 frames, the filter of nearly equal frames before the tower (cosine above 0.95) and the stretched
    context (YaRN) are the stream's matter. In a plain generation the prompt is one clip, and its last tokens are the
    proxy. Where the proxy's own keys are not among the slots, the evidence says so by its ``mask``.

    Raises ``ValueError`` for settings out of range, a budget that new frames' prototypes fill, and NaN.
    """

    keep: int | float | None = None
    M: int = 6000
    proxy: int = 5
    heads: Literal["kv", "all"] = "kv"
    merge: Literal["weighted", "average", "none"] = "weighted"
    merge_keys: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.M, "M", 1)
        check_count(self.proxy, "proxy", 1)

    def query_rows(self) -> int:
        return self.proxy

    def merges_keys(self, evidence: CacheEvidence) -> bool:
        return self.merge_keys

    def score(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N): 1 for every slot, so that those of the next clip are known by their 0."""
        return torch.ones(evidence.keys.shape[:2], device=evidence.keys.device)

    def plan(self, evidence: CacheEvidence) -> Plan:
        visual = evidence.visual
        cap = budget(self.M if self.keep is None else self.keep, visual)
        if bool((cap >= visual.sum(1, keepdim=True)).all()):
            return Identity.like(evidence.keys)
        worth = self.importance(evidence)
        check_finite(worth, visual)
        stay = evidence.there & ~visual
        if self.merge == "none":
            return keep_slots(stay | best(worth, visual, cap), evidence)
        frame, count = self._new_frames(evidence)
        over = cap < visual.sum(1, keepdim=True)
        if bool((over & (cap <= count)).any()):
            raise ValueError(
                f"{int(count.max())} new frames have a prototype each, and only {int(cap[over].min())} slots stay; "
                f"give a larger budget, or shorter clips"
            )
        # Frames that lose nothing need no prototype, and their place goes to the next best slot, until all is settled.
        while True:
            chosen = best(worth, visual, torch.where(over, cap - count, cap))
            host = _best_of(worth, frame, visual & ~chosen)
            needed = _hosts(host)
            if bool((needed == count)[over].all()):
                break
            count = torch.where(over, needed, count)
        stay = stay | chosen
        share = worth if self.merge == "weighted" else torch.ones_like(worth)
        total = _summed(share, frame)
        share = torch.where(total > 0, share / total.clamp(min=torch.finfo(share.dtype).tiny), 1 / _summed(1, frame))
        return _mixed(evidence, stay, frame, host, share)

    def importance(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N): the proxy's attention over the visual slots."""
        known = evidence.rows_given
        if not known:
            evidence.rows()
        logits = evidence.logits(known - min(known, self.proxy), known)
        visual = evidence.visual[:, None, None]
        rows = logits.masked_fill(~visual, float("-inf")).softmax(-1)
        rows = rows.masked_fill(~visual | (logits.amax(-1, keepdim=True) == float("-inf")), 0.0)
        real = evidence.row_there(self.proxy)[:, None, :, None]
        worth = (rows * real).sum(2).div(real.sum(2).clamp(min=1)).mean(1)
        if self.heads == "all":
            worth = evidence.fold(evidence.unfold(worth).mean(1))
        return worth

    def _new_frames(self, evidence: CacheEvidence) -> tuple[Tensor, Tensor]:
        """(B*Hkv,N) place of a new slot's frame among the new frames, -1 elsewhere, and (B*Hkv,1) how many these
        are."""
        new = evidence.visual
        if evidence.scores is not None:
            new = new & (evidence.scores == 0)
        number = evidence.frame_of
        new = new & (number >= 0)
        frame, count = torch.full_like(number, -1), torch.zeros_like(number[:, :1])
        for row in range(len(number)):
            values, place = number[row, new[row]].unique(return_inverse=True)
            frame[row, new[row]], count[row] = place, len(values)
        return frame, count


def _summed(x: Tensor | int, frame: Tensor) -> Tensor:
    """(R,N) what the slots of a slot's frame have in sum; of 1, how many they are."""
    values = torch.ones(frame.shape, device=frame.device) if isinstance(x, int) else x
    index = torch.where(frame < 0, frame.shape[1], frame)
    totals = torch.zeros(frame.shape[0], frame.shape[1] + 1, device=frame.device).scatter_add(1, index, values)
    return totals.gather(1, index)


def _best_of(worth: Tensor, frame: Tensor, among: Tensor) -> Tensor:
    """(R,N) the slot of ``among`` that is worth most in a slot's frame, the lower one of equals; -1 where none is."""
    n = frame.shape[1]
    index = torch.where(among & (frame >= 0), frame, n)
    top = torch.full((frame.shape[0], n + 1), float("-inf"), device=frame.device)
    top = top.scatter_reduce(1, index, worth.float(), "amax")
    place = torch.arange(n, device=frame.device).expand_as(frame)
    place = torch.where((worth == top.gather(1, index)) & (index < n), place, n)
    first = torch.full_like(top, n, dtype=torch.long).scatter_reduce(1, index, place, "amin")
    first[:, n] = n
    out = first.gather(1, torch.where(frame < 0, n, frame))
    return torch.where(out == n, -1, out)


def _hosts(host: Tensor) -> Tensor:
    """(R,1) how many slots are hosts."""
    marks = torch.zeros(host.shape[0], host.shape[1] + 1, device=host.device)
    marks.scatter_(1, torch.where(host < 0, host.shape[1], host), 1.0)
    return marks[:, :-1].sum(1, keepdim=True).long()


def _mixed(evidence: CacheEvidence, stay: Tensor, frame: Tensor, host: Tensor, share: Tensor) -> Plan:
    """The plan that keeps ``stay`` and puts the mean of every frame with a host into its host's slot."""
    samples = []
    for row in range(len(stay)):
        src = (host[row] >= 0).nonzero().flatten()
        hosts = host[row, src]
        held = stay[row].clone()
        own = held.nonzero().flatten()
        held[hosts] = True
        keep = held.nonzero().flatten()
        place = held.long().cumsum(0) - 1
        weight = torch.cat([torch.ones_like(own, dtype=share.dtype), share[row, src]])
        samples.append((keep, torch.cat([own, src]), place[torch.cat([own, hosts])], weight))
    return Mix.from_samples(stay.shape[1], samples)
