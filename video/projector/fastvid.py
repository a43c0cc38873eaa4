"""FastVID (arXiv 2503.11187): salient tokens of every frame, and context tokens merged from whole segments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.clustering import peaks
from tokenreduce.algorithms.projector import SCORES, Salient, share, top
from tokenreduce.algorithms.scoring import distances, finite, inner, unit
from tokenreduce.algorithms.temporal import Temporal, adjacent, best_of_frames, by_frame, cut_by_similarity
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Mix, Plan

__all__ = ["FastVID"]

#: Neighbours in the density of a token, itself included, as published.
_NEIGHBOURS = 4


@dataclass(frozen=True)
class FastVID(Temporal, Salient, name="fastvid", needs=("tower",), paper="2503.11187", title="FastVID"):
    """FastVID: segments of similar frames; every frame keeps its salient tokens, a few anchor frames of a segment
    also context tokens, into which the rest of the segment is merged.

    The video is cut where adjacent frames are less similar than ``dyseg_tau``, and further at the least similar ones
    until there are ``dyseg_c`` segments. A segment's part of ``keep`` is that of its frames. ``stprune_d`` of it are
    context tokens, shared out among the anchors: the last frame of the segment and every ``dtm_p``-th before it.
    Salient tokens are those of highest attention in the vision tower. Context tokens (targets) are the density peaks
    (DPC-KNN scores) among an anchor's other tokens. For every anchor anew, each token of the segment that is not
    salient joins the anchor's target with the highest cosine; of n that joined with mean m, a target x becomes
    w x + (1 - w) m, with w = max(1 / (n + 1), dtm_beta). Outputs are in the order of the prompt, at the place of their
    token.

    Published code for SigLIP takes saliency and the features by which frames are compared from the tower's own pooling
    head: the attention of its query, and what it makes of a frame. So does ``score="auto"`` where the tower still has
    that head (``vision_use_head``, which checkpoints of language models mostly set to False), reading its last layer.
    Elsewhere, and with another ``score`` or a ``layer``, saliency is attention in that block and frames are compared by
    the mean of their embeddings, as in the code for Qwen2.5-VL. A token feeds one target of every anchor, so plans grow
    with the square of a segment's length.

    Different from the official code: the number of outputs is ``keep`` (there rounding loses some). Frame t of T
    answers for floor((t+1) keep / T) - floor(t keep / T) of it, so that fewer than one per frame are spread evenly.
    Context tokens that no anchor takes become salient tokens; these are shared out evenly in a segment, the first
    frames take the rest. ``dyseg_c`` is at most T; ties go to the lower index (there noise); an all-zero token is
    similar to none.

    Args:
        keep: visual tokens of a whole video that stay, a count or a ratio.
        dyseg_c: least number of segments.
        dyseg_tau: cosine of adjacent frames below which a segment ends (0.9 for LLaVA, 0.84 for Qwen2.5-VL).
        dyseg_ignore: frames of a segment at least this similar form a group of which only the last frame keeps tokens,
            as long as it has room (0.95 for Qwen2.5-VL); None for none, as for LLaVA.
        stprune_d: share of context tokens.
        dtm_p: step between anchors.
        dtm_beta: least weight of a target's own value.
        pool: which of the two published codes is followed. "all" (LLaVA-OneVision): all tokens that are not salient
            join targets, targets of this and other anchors too; context tokens are rounded down frame by frame, every
            anchor takes as many, at most what it has room for beside its salient tokens, and the rest of the division
            is left. "others" (Qwen2.5-VL): this anchor's targets do not join; context tokens are rounded down for the
            whole segment, at least one, the anchors at its end take one more of what division leaves, and none takes
            more than half of a frame (in a segment of one frame: all of it). The code for LLaVA-Video is the same
            without "at least one" and the half.
        score: "head" is the pooling head, refused where a tower has none; others as in
            :class:`~tokenreduce.algorithms.projector.Salient`, "auto" takes the head first.
        layer: see :class:`~tokenreduce.algorithms.projector.Salient`; None with "head".
        positions: "original" by default, as published: gaps tell the time. See
            :class:`~tokenreduce.algorithms.projector.Projector`, also for ``newlines``.

    Raises ``ValueError`` for values other than these.
    """

    scores: ClassVar[tuple[str, ...]] = (*SCORES, "head")

    keep: int | float = 0.10
    dyseg_c: int = 8
    dyseg_tau: float = 0.9
    dyseg_ignore: float | None = None
    stprune_d: float = 0.4
    dtm_p: int = 4
    dtm_beta: float = 0.6
    pool: str = "all"
    positions: str | None = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.dyseg_c, "dyseg_c", 1)
        check_count(self.dtm_p, "dtm_p", 1)
        for name, low in (("dyseg_tau", -1), ("dyseg_ignore", -1), ("stprune_d", 0), ("dtm_beta", 0)):
            value = getattr(self, name)
            if name == "dyseg_ignore" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
                raise ValueError(f"{name} is a number in [{low}, 1], not {value!r}")
        if self.pool not in ("all", "others"):
            raise ValueError(f"pool is 'all' or 'others', not {self.pool!r}")
        if self.score == "head" and self.layer is not None:
            raise ValueError(f"score='head' reads the pooling head behind the last layer, not layer={self.layer}")

    def required(self) -> tuple[str, ...]:
        return ("tower", "head") if self.score == "head" else super().required()

    def optional(self) -> tuple[str, ...]:
        return ("head",) if self.score == "auto" and self.layer is None else ()

    def tower_blocks(self) -> tuple[Look, ...]:
        return () if self.score == "head" else super().tower_blocks()

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        x, p = by_frame(evidence), evidence.prefix
        head = evidence.pooling() if "head" in (*self.required(), *self.optional()) else None
        if head is None and self.score == "head":
            raise ValueError("this method needs head, the pooling head of a vision tower, which the evidence lacks")
        scores, whole = (self.saliency(evidence), x.mean(2)) if head is None else head
        scores = finite(scores.float(), evidence).reshape(x.shape[:3])
        alike = adjacent(whole.float().unsqueeze(2)).squeeze(-1)
        return Mix.from_samples(
            evidence.n, [self._sample(*rows, keep, p) for rows in zip(x, scores, alike, strict=True)]
        )

    def quotas(self, alike: Tensor, frames: int, n: int, budget: int) -> tuple[list[int], list[int]]:
        """Salient and context tokens of ``frames`` frames of n tokens, a segment with ``budget`` outputs; ``alike``
        (frames-1,) are cosines of adjacent frames."""
        ends = list(range(frames - 1))
        if self.dyseg_ignore is not None:
            ends = (alike < self.dyseg_ignore).nonzero().flatten().tolist()
        ends.append(frames - 1)
        anchors = ends[:: -self.dtm_p]
        parts = self._targets(budget, frames, n, len(ends), len(anchors))
        contexts = [0] * frames
        for t, part in zip(anchors, parts, strict=True):
            contexts[t] = part
        salients = [0] * frames
        left = budget - sum(contexts)
        for mine in (ends, [t for t in range(frames) if t not in ends]):
            for t, count in zip(mine, share(left, [n - contexts[t] for t in mine]), strict=True):
                salients[t] = count
            left = budget - sum(contexts) - sum(salients)
        return salients, contexts

    def _targets(self, budget: int, frames: int, n: int, ends: int, anchors: int) -> list[int]:
        """Context tokens of each anchor, from the last one back, of a segment in which ``ends`` frames keep tokens."""
        # Rounded down, as published, but not for the rounding of the product.
        if self.pool == "all":
            context = frames * int(budget * self.stprune_d / frames + 1e-6)
            salient = min(n, -(-(budget - context) // ends))
            return [min(context // anchors, n - salient)] * anchors
        context = min(max(int(budget * self.stprune_d + 1e-6), 1), budget)
        most = n if frames == 1 else n // 2
        return [min(part, most) for part in share(context, [context] * anchors)]

    def _sample(
        self, x: Tensor, scores: Tensor, alike: Tensor, keep: int, p: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The entries of one video ``x`` (T,n,C), see :meth:`Mix.from_samples`, behind ``p`` protected tokens."""
        t, n = scores.shape
        lead = torch.arange(p, device=x.device)
        kept, src, to, weight = [lead], [lead], [lead], [x.new_ones(p)]
        for first, last in cut_by_similarity(alike, self.dyseg_tau, self.dyseg_c):
            budget = last * keep // t - first * keep // t
            salients, contexts = self.quotas(alike[first : last - 1], last - first, n, budget)
            salient = best_of_frames(scores[None, first:last], torch.tensor(salients, device=x.device))[0]
            own = p + first * n + salient.flatten().nonzero().flatten()
            for entries in (kept, src, to):
                entries.append(own)
            weight.append(x.new_ones(len(own)))
            block = x[first:last]
            free = (~salient.flatten()).nonzero().flatten()
            pool = unit(block.flatten(0, 1)[free])
            for i, count in enumerate(contexts):
                if count:
                    d = distances(block[i : i + 1]) / math.sqrt(x.shape[-1])
                    score = peaks(d, _NEIGHBOURS, salient[i : i + 1])
                    targets = i * n + top(score, count)[0].sort().values
                    source, target, share_of = self._merge(free, pool, targets)
                    kept.append(p + first * n + targets)
                    src.append(p + first * n + source)
                    to.append(p + first * n + target)
                    weight.append(share_of)
        keeps = torch.cat(kept).sort().values
        return keeps, torch.cat(src), torch.searchsorted(keeps, torch.cat(to)), torch.cat(weight)

    def _merge(self, free: Tensor, pool: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(source, target, weight) for the tokens ``free`` (M,) with directions ``pool`` (M,C), ``targets`` (K,) among
        them."""
        at = torch.searchsorted(free, targets)
        group = inner(pool[None], pool[at][None])[0].argmax(1)
        joins = torch.ones_like(free, dtype=torch.bool)
        if self.pool == "others":
            joins[at] = False
        count = torch.zeros_like(targets, dtype=torch.float32).scatter_add(0, group, joins.float())
        own = (1 / (count + 1)).clamp(min=self.dtm_beta)
        rest = (1 - own) / count.clamp(min=1)
        # One entry for a target that joined itself: alone it has weight 1 and keeps its value.
        mine = joins[at] & (group[at] == torch.arange(len(at), device=at.device))
        weight = rest[group].scatter_add(0, at[mine], own[mine])
        far = ~mine
        return (
            torch.cat([free[joins], targets[far]]),
            torch.cat([targets[group[joins]], targets[far]]),
            torch.cat([weight[joins], own[far]]),
        )
