"""SparseVLM (arXiv 2410.04417): text tokens that look at the picture rate the visual tokens, in a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, distances, finite, inner
from tokenreduce.algorithms.sequence import best, check_stages, keep_chosen, packed, question, stages_of, visual_of
from tokenreduce.core.budget import check_keep, count, geometric
from tokenreduce.core.evidence import Evidence, LanguageEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, take
from tokenreduce.core.reducer import Reducer

__all__ = ["SparseVLM"]


@dataclass(frozen=True)
class SparseVLM(
    Reducer, name="sparsevlm", stage="language", needs=("attention", "prompt"), paper="2410.04417", title="SparseVLM"
):
    """SparseVLM: in a few layers, keep the visual tokens that text raters attend to, and recycle some of the others.

    Raters are found once, from the embeddings that enter the language model: every visual token spreads one vote over
    the question (the real tokens behind a sample's last visual one) by a softmax of plain inner products; raters are
    the tokens with strictly more votes than the mean. In a pruning layer the visual tokens are scored by that layer's
    softmaxed attention, averaged over heads and raters. They vanish from the layer's output: the plan is applied
    before the layer behind it.

    Of the removed tokens the best ``int(recycle * removed) + 1`` form ``int(those * cluster) + 1`` clusters by density
    peaks (distances over sqrt(channels) of the layer's output, as many neighbours as clusters); the plain mean of a
    cluster replaces its centre and is an ordinary visual token from then on.

    Args:
        pruning_loc: 0-based layers whose attention is read; 2, 6, 15 of 32 and the same places in other depths.
        keep: visual tokens left behind the last pruning layer, clusters included: a count, or a ratio of those at the
            entry of the language model, reached by equal ratios.
        counts: tokens kept behind each pruning layer, as ints or as shares of those at the entry; clusters come on top
            (release 1.5; ``(300, 200, 110)`` are its numbers for 576 tokens in 32 layers, called 192 there).
        scale, bias: the first release's rule, used when neither ``keep`` nor ``counts`` is given: ``int(rank * scale +
            bias)`` tokens are kept, with the rank of the raters' attention to the visual tokens; clusters come on top.
        recycle: share of the removed tokens that is recycled; 0 drops them all.
        cluster: share of the recycled tokens that become clusters.

    Decisions: a cluster stands at its centre's position, and all tokens keep their original positions (release 2.0
    does that; the releases with clusters renumber and put clusters behind the kept tokens); without a rater the last
    real token rates; a layer in which nothing would be removed, or one token replaced by itself, does nothing; at
    least one token is kept; ties and equal densities go to the token with the higher score, then to the lower index
    (the published code adds noise); the mean has no epsilon; densities are compared as logarithms. Not part of it: the
    division by rotary products and the choice of heads of release 2.0. In Qwen3-VL, a cluster made before layer 3 gets
    the DeepStack features of its centre.

    Raises ``ValueError`` for settings outside these ranges, both ``keep`` and ``counts``, or layers that the model
    does not have (the last one prunes nothing, since no layer is behind it).
    """

    pruning_loc: tuple[int, ...] | None = None
    keep: int | float | None = None
    counts: tuple[int | float, ...] | None = None
    scale: float = 13.5
    bias: float = 0.0
    recycle: float = 0.3
    cluster: float = 0.1

    def __post_init__(self) -> None:
        for name in ("pruning_loc", "counts"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_stages(self.pruning_loc, "pruning_loc", 0)
        check_keep(self.keep)
        if self.counts is not None:
            if self.keep is not None:
                raise ValueError("give counts or keep, not both")
            stages = 3 if self.pruning_loc is None else len(self.pruning_loc)
            if not isinstance(self.counts, tuple) or len(self.counts) != stages:
                raise ValueError(f"counts is a tuple with one number for each of {stages} layers, not {self.counts!r}")
            for value in self.counts:
                check_keep(value, "counts")
        for name, low, high in (("scale", 0, None), ("bias", None, None), ("recycle", 0, 1), ("cluster", 0, 1)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
            if not number or (low is not None and value < low) or (high is not None and value > high):
                limits = "" if low is None else f" >= {low}" if high is None else f" in [{low}, {high}]"
                raise ValueError(f"{name} is a number{limits}, not {value!r}")

    def _layers(self, depth: int) -> tuple[int, ...]:
        """The layers before which plans are applied: those behind the pruning layers."""
        if self.pruning_loc is not None:
            stages_of(self.pruning_loc, depth - 1, "pruning_loc")
            return tuple(layer + 1 for layer in self.pruning_loc)
        if depth < 4:
            raise ValueError(f"three pruning layers need a language model of 4 layers, not {depth}; give pruning_loc")
        return tuple(max(i, (layer * depth + 16) // 32) + 1 for i, layer in enumerate((2, 6, 15)))

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self._layers(depth)

    def plan(self, evidence: LanguageEvidence) -> Plan:
        visual = visual_of(evidence)
        rows, there = _raters(evidence)
        seen = finite(_attention(evidence, rows), evidence) * there.unsqueeze(-1)
        scores = seen.sum(1) / there.sum(1, keepdim=True)
        budgets = self._budgets(seen, there, evidence)
        kept = torch.tensor([k for k, _ in budgets], device=visual.device).unsqueeze(1)
        chosen = best(scores, visual, kept)
        if not any(clusters for _, clusters in budgets):
            return keep_chosen(chosen, evidence)
        return self._merge(scores, chosen, [clusters for _, clusters in budgets], evidence)

    # -- how many --------------------------------------------------------------------------------------------------
    def _recycled(self, removed: int) -> int:
        return min(removed, int(self.recycle * removed) + 1) if self.recycle else 0

    def _clusters(self, removed: int) -> int:
        recycled = self._recycled(removed)
        return min(recycled, int(recycled * self.cluster) + 1)

    def _budgets(self, seen: Tensor, there: Tensor, evidence: LanguageEvidence) -> list[tuple[int, int]]:
        """Tokens kept and clusters made in each sample; ``seen`` (B,R,N) is what raters see."""
        present: list[int] = visual_of(evidence).sum(1).tolist()
        entry: list[int] = evidence.visual_entry()[:, 0].tolist()
        layers = self._layers(evidence.depth)
        stage, ranks = layers.index(evidence.layer), present
        if self.keep is None and self.counts is None:
            visual = visual_of(evidence)
            ranks = _rank(seen * visual.unsqueeze(1), there.sum(1), visual.sum(1)).tolist()
        out = []
        for v, first, rank in zip(present, entry, ranks, strict=True):
            if v == 0:
                kept, clusters = 0, 0
            elif self.keep is not None:
                kept, clusters = self._within(min(v, geometric(self.keep, first, stage, len(layers))), v)
            else:
                if self.counts is not None:
                    kept = count(self.counts[stage], first)
                else:
                    kept = v if rank == v else max(1, int(rank * self.scale + self.bias))
                clusters = self._clusters(max(v - kept, 0))
            out.append((v, 0) if kept + clusters >= v else (kept, clusters))
        return out

    def _within(self, wanted: int, present: int) -> tuple[int, int]:
        """The most tokens to keep so that they and the clusters of the others are ``wanted`` of ``present``."""
        kept = min(wanted, present)
        while kept > 1 and kept < present and kept + self._clusters(present - kept) > wanted:
            kept -= 1
        return kept, min(self._clusters(present - kept), wanted - kept)

    # -- what becomes of them --------------------------------------------------------------------------------------
    def _merge(self, scores: Tensor, chosen: Tensor, clusters: list[int], evidence: LanguageEvidence) -> Plan:
        """Keep ``chosen`` and all text, and make ``clusters[b]`` tokens of the best others of sample b."""
        visual, n = visual_of(evidence), evidence.n
        slots, sources, targets = [], [], []
        for b, k in enumerate(clusters):
            removed = (visual[b] & ~chosen[b]).nonzero().flatten()
            stay = (~visual[b] | chosen[b]).clone()
            src = dst = removed[:0]
            if k:
                pool = removed[descending(scores[b, removed])][: self._recycled(len(removed))]
                centres, nearest = _density_peaks(evidence.x[b, pool], k)
                stay[pool[centres]] = True
                moved = torch.ones_like(pool, dtype=torch.bool)
                moved[centres] = False
                src, dst = pool[moved], pool[centres[nearest[moved]]]
            slot = stay.long().cumsum(0) - 1
            slots.append(stay.nonzero().flatten())
            sources.append(src)
            targets.append(slot[dst])
        width = max(map(len, slots))
        most = max(map(len, sources))
        if all(len(s) == n for s in slots):
            return Identity.like(evidence.x)
        keep = torch.stack([torch.cat([s.new_zeros(width - len(s)), s]) for s in slots])
        valid = torch.stack([torch.arange(width, device=s.device) >= width - len(s) for s in slots])
        # A sample with fewer sources repeats a token that nothing joins: it changes neither its value nor its size.
        src_rows, dst_rows, real = [], [], []
        for slot, s, t in zip(slots, sources, targets, strict=True):
            alone = torch.ones_like(slot, dtype=torch.bool)
            alone[t] = False
            more = most - len(s)
            spare = alone.nonzero()[0] if more else t[:0]
            src_rows.append(torch.cat([s, slot[spare].expand(more)]))
            dst_rows.append(torch.cat([t, spare.expand(more)]) + width - len(slot))
            real.append(torch.arange(most, device=s.device) < len(s))
        joins = torch.stack(real)
        return Merge(
            n, keep, torch.stack(src_rows), torch.stack(dst_rows),
            size_scale=None if bool(joins.all()) else joins.float(), valid=None if bool(valid.all()) else valid,
            by_size=False,
        )  # fmt: skip


def _raters(evidence: LanguageEvidence) -> tuple[Tensor, Tensor]:
    """``(rows, there)``, (B,R) each: the present tokens that rate, the last one where there is no other."""
    prompt, last = evidence.prompt, evidence.last()
    if prompt is None or prompt.x is None:
        raise ValueError("this method needs prompt, which the evidence lacks: give Evidence(prompt=Prompt(..., x=...))")
    x, texts = prompt.x.float(), question(prompt.visual, prompt.valid)
    index, there = packed(texts)
    votes = finite(inner(x, take(x, index)), evidence)  # each row of which shows NaN in its token
    share = votes.masked_fill(~there.unsqueeze(1), torch.finfo(votes.dtype).min).softmax(-1)
    share = (share * prompt.visual.unsqueeze(-1)).sum(1) * there
    mean = share.sum(1, keepdim=True) / there.sum(1, keepdim=True)
    index, there = packed(torch.zeros_like(texts).scatter(1, index, there & (share > mean)))
    # Tokens behind the last visual one are never dropped, so they are where they were, counted from the end.
    end = Evidence(prompt.x, valid=prompt.valid).last()
    none = ~there.any(1, keepdim=True)
    there = there | (none & (torch.arange(there.shape[1], device=there.device) == 0))
    return torch.where(there & ~none, index - end + last, last), there


def _attention(evidence: LanguageEvidence, rows: Tensor, chunk: int = 64) -> Tensor:
    """(B,R,N) attention of ``rows`` (B,R), averaged over heads; a few rows at a time, for long questions."""
    parts = [evidence.attention(part).mean(1) for part in rows.split(chunk, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rank(seen: Tensor, raters: Tensor, visual: Tensor) -> Tensor:
    """(B,) ranks of ``seen`` (B,R,N), zero outside ``raters`` x ``visual`` (numbers of them, (B,)), which sets the
    tolerance."""
    tolerance = torch.finfo(torch.float32).eps * torch.maximum(raters, visual).float()
    return torch.linalg.matrix_rank(seen.float(), atol=torch.zeros_like(tolerance), rtol=tolerance)


def _density_peaks(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(centres, nearest)`` of points ``x`` (M,C), which are in the order that settles ties: (k,) indices, best first,
    and (M,) the centre that each point joins."""
    d = distances(x.unsqueeze(0))[0] / x.shape[-1] ** 0.5
    d = torch.minimum(d, d.T)  # two tokens that are nearest to each other are equally dense, not so by rounding
    density = -d.topk(k, largest=False).values.square().mean(1)
    rank = descending(density).argsort()
    isolation = d.masked_fill(rank[None] >= rank[:, None], float("inf")).amin(1)
    # The densest token has none denser; it comes first either way, so infinity stands for the largest distance.
    centres = descending(density + isolation.log())[:k]
    nearest = d[:, centres].argmin(1)
    nearest[centres] = torch.arange(k, device=x.device)
    return centres, nearest
