"""Zero-TPrune (arXiv 2305.17328): weighted page rank on the attention graph, with a similarity step before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, inner, unit
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Plan, Prune, take
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["ZeroTPrune"]


@dataclass(frozen=True)
class ZeroTPrune(
    Reducer, name="zerotprune", stage="encoder", needs=("keys", "attention"), paper="2305.17328", title="Zero-TPrune"
):
    """Zero-TPrune: drops near-copies of important patches, then the patches that the attention graph ranks lowest.

    Tokens vote for the tokens they attend to, with their own score as voting power (weighted page rank, s <- A^T s).
    One round ranks the patches for the similarity step: of the less important half the ``r`` patches whose keys are
    most similar to a patch of the other half are dropped. Then the ranking is made again among the survivors, with more
    rounds, and the best ``k`` stay, in original order. No official code exists; where the paper's text left a
    question open, the answer is below.

    Args:
        layers: 0-based layers that prune; 3, 6, 9 of 12 and the same places in other depths by default.
        r: patches that the similarity step drops, a number or one per layer of ``layers`` in ascending order; at most
            half (rounded down) of what is there, more is clamped and reported.
        k: patches that the importance step keeps, a number or one per layer; None keeps all.
        keep: instead of ``r`` and ``k``: patches left after the last of ``layers``, a count or a ratio, reached by
            equal ratios. ``s_share`` of what a layer drops is the similarity step's.
        s_share: see ``keep``; a third by default (this library's choice: the paper searches both per budget).
        iterations: rounds of the importance step: one number, or three for the first quarter of the depth, the middle
            and the last quarter. The default is the lower end of the paper's 30-50, 5-10 and 1.
        v_min, v_max: heads whose scores vary less or more than this are not asked. The variance is taken over the
            patches, of scores with mean 1 over all tokens (a variance of scores that sum to 1 could never reach the
            published lower bound). If no head is left, all are.
        start: "cls" gives the class token the square root of N times the score of the others at first, "uniform" is
            the paper's variant Zero-TPrune-uni; a model without class token always uses it.

    Points that the sources leave open: the start is scaled to sum 1, and made anew for the survivors; in the second
    ranking rows and columns of dropped tokens are removed and the rows divided by their sums; keys of all heads are
    compared side by side; the larger half is the more important one; protected tokens vote and are never dropped. Of
    equally similar patches the one listed first goes: the more important, then the lower index. Heads are combined
    by the root mean square of their scores. The whole attention map is computed, but in pruning layers only.

    Raises ``ValueError`` for bad settings, and for layers that the model does not have.
    """

    layers: tuple[int, ...] | None = None
    r: int | tuple[int, ...] = 0
    k: int | tuple[int, ...] | None = None
    keep: int | float | None = None
    s_share: float = 1 / 3
    iterations: int | tuple[int, ...] = (30, 5, 1)
    v_min: float = 0.01
    v_max: float = 0.7
    start: str = "cls"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("layers", "r", "k", "iterations"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check_layers(self.layers, "layers")
        for name, least in (("r", 0), ("k", 1), ("iterations", 1)):
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else () if value is None and name == "k" else (value,):
                check_count(item, name, least)
        if isinstance(self.iterations, tuple) and len(self.iterations) != 3:
            raise ValueError(f"iterations is one number or three (first, middle, last layers), not {self.iterations!r}")
        if self.keep is not None and (self.r != 0 or self.k is not None):
            raise ValueError("give keep or r and k, not both")
        if not 0 <= self.s_share <= 1:
            raise ValueError(f"s_share is in [0, 1], not {self.s_share!r}")
        if not 0 <= self.v_min <= self.v_max:
            raise ValueError(f"0 <= v_min <= v_max bound a variance, not v_min={self.v_min!r}, v_max={self.v_max!r}")
        if self.start not in ("cls", "uniform"):
            raise ValueError(f"start is 'cls' or 'uniform', not {self.start!r}")

    def _layers(self, depth: int) -> tuple[int, ...]:
        chosen = stage_layers(self.layers, depth, "layers")
        for name in ("r", "k"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(chosen):
                raise ValueError(f"{name} lists {len(value)} numbers for {len(chosen)} layers; give one each")
        return chosen

    def acts_at(self, layer: int, depth: int) -> bool:
        layers = self._layers(depth)
        idle = self.r == 0 and self.k is None if self.keep is None else isinstance(self.keep, float) and self.keep == 1
        return layer in layers and not idle

    def rounds(self, layer: int, depth: int) -> int:
        """Iterations of the importance step in ``layer``.

        >>> [ZeroTPrune().rounds(i, 12) for i in (2, 3, 8, 9)]
        [30, 5, 5, 1]
        """
        if isinstance(self.iterations, int):
            return self.iterations
        end = depth // 4
        return self.iterations[0 if layer < end else 2 if layer >= depth - end else 1]

    def amounts(self, evidence: EncoderEvidence) -> tuple[int, int]:
        """Patches that the similarity step drops and that the importance step keeps, here."""
        free, layers = evidence.free(), self._layers(evidence.depth)
        if evidence.layer not in layers:
            return 0, free
        if self.keep is not None:
            left = min(free, staged(self.keep, evidence, layers))
            return min(int((free - left) * self.s_share + 0.5), free // 2), left
        step = layers.index(evidence.layer)
        r = self.r[step] if isinstance(self.r, tuple) else self.r
        k = self.k[step] if isinstance(self.k, tuple) else self.k
        if r > free // 2:
            evidence.note(
                f"{self.name}: r={r} clamped to {free // 2} at layer {evidence.layer} ({free} patches)",
                f"{self.name}: r={r} is more than half of the patches in some layers; tr.record(model) notes where",
            )
            r = free // 2
        return r, free - r if k is None else min(k, free - r)

    def plan(self, evidence: EncoderEvidence) -> Plan:
        n, free = evidence.n, evidence.free()
        r, k = self.amounts(evidence)
        if k == free:
            return Identity.like(evidence.x)
        device = evidence.x.device
        fixed, valid = evidence.fixed(), evidence.valid
        fixed = torch.zeros(evidence.batch, n, dtype=torch.bool, device=device) if fixed is None else fixed
        there = torch.ones_like(fixed) if valid is None else valid
        graph = evidence.attention("all")
        scores, dropped = None, torch.zeros_like(fixed)
        if r:
            scores = finite(self._rank(graph, there, fixed, evidence, 1), evidence)
            dropped = self._copies(scores, there, fixed, evidence, r)
        if k < free - r:
            rounds = self.rounds(evidence.layer, evidence.depth)
            scores = finite(self._rank(graph, there & ~dropped, fixed, evidence, rounds), evidence)
        assert scores is not None
        # Slots that are not there stay before near-copies do: they are masked, and a sample alone has none.
        scores = scores.masked_fill(~there, -1.0).masked_fill(dropped, -2.0).masked_fill(fixed, float("inf"))
        return Prune(n, descending(scores)[:, : n - free + k].sort(dim=-1).values)

    def _rank(self, graph: Tensor, alive: Tensor, fixed: Tensor, evidence: EncoderEvidence, rounds: int) -> Tensor:
        """(B,N) page rank among the ``alive`` tokens, heads filtered and combined; the mean over a head is 1."""
        number = alive.sum(1, keepdim=True).float()
        power = alive.float()
        if evidence.cls and self.start == "cls":
            first = torch.arange(evidence.n, device=alive.device) == 0
            power = torch.where(first, number.sqrt(), power)
        s = (power / power.sum(1, keepdim=True))[:, None, None].expand(-1, graph.shape[1], -1, -1)
        graph = graph * alive[:, None, None]
        graph = graph / graph.sum(-1, keepdim=True).clamp(min=torch.finfo(graph.dtype).tiny)
        with torch.autocast(s.device.type, enabled=False):
            for _ in range(rounds):
                s = s @ graph  # a token that is not alive has no power, so its row does not matter
        s = s.squeeze(2) * number[:, None]
        judged = (alive & ~fixed).float()[:, None]
        judges = judged.sum(-1).clamp(min=1)
        mean = (s * judged).sum(-1) / judges
        variance = ((s - mean[..., None]).square() * judged).sum(-1) / judges
        heard = (variance >= self.v_min) & (variance <= self.v_max)
        heard = (heard | ~heard.any(1, keepdim=True)).float()
        return ((s.square() * heard[..., None]).sum(1) / heard.sum(1, keepdim=True)).sqrt()

    def _copies(self, scores: Tensor, there: Tensor, fixed: Tensor, evidence: EncoderEvidence, r: int) -> Tensor:
        """(B,N) bool: the ``r`` patches of the less important half that are most similar to one of the other half."""
        free = evidence.free()
        order = descending(scores.masked_fill(~there, -1.0).masked_fill(fixed, -2.0))[:, :free]
        split = free - free // 2
        ragged = evidence.valid is not None
        less, more = (order, order) if ragged else (order[:, split:], order[:, :split])
        keys = unit(evidence.keys.transpose(1, 2).flatten(2))
        similarity = finite(inner(take(keys, less), take(keys, more)), evidence)
        if ragged:  # every sample has a middle of its own
            number = (there & ~fixed).sum(1, keepdim=True)
            place = torch.arange(free, device=order.device)
            low = (place >= number - number // 2) & (place < number)
            high = place < number - number // 2
            similarity = similarity.masked_fill(~(low[:, :, None] & high[:, None]), float("-inf"))
        best = similarity.amax(-1)
        chosen = descending(best)[:, :r]
        found = best.gather(1, chosen) > float("-inf")
        return torch.zeros_like(fixed).scatter(1, less.gather(1, chosen), found)
