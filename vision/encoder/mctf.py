"""Multi-Criteria Token Fusion, MCTF (arXiv 2403.10030)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, finite, inner, received_attention, unit
from tokenreduce.core.budget import check_count, check_either
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.reducer import Reducer, check_size_bias
from tokenreduce.core.schedule import check_layers, stage_layers, staged

__all__ = ["MCTF"]

_DEFAULT_R = 0.35
#: Pooling types of the paper's code as settings of a Merge; type 1 also gets weights.
_POOLING = {0: {}, 1: {}, 2: {"mode": "max"}, 3: {"by_size": False}}


@dataclass(frozen=True)
class MCTF(
    Reducer, name="mctf", needs=("attention",), position="before", paper="2403.10030",
    title="Multi-Criteria Token Fusion",
):  # fmt: skip
    """MCTF: fuse even and odd tokens that are similar, little attended and small, at the input of a few blocks.

    The score of a pair is the product of similarity ((cos+1)/2)^(1/tau_sim) of the raw block input, information
    (u_a u_b)^(1/tau_info) with u the inverse of the mean attention received, and size (v_a v_b)^(1/tau_size) with v
    the inverse size. Half of the tokens to remove are even ones that go into their best odd one; then, with the same
    scores, the other half are odd ones that go into their best even one that is left, taking along what they received.
    Both steps are one flat plan, so every original weight counts once.

    Args:
        r: tokens removed per acting layer: a count (int) or a share of the unprotected tokens (float below 1), rounded
            down. At most half of them go. The paper's scripts use 0.35 in layers 3, 6, 9 and 16 in layers 1 to 11.
        layers: 0-based layers that act; by default 3, 6, 9 of 12 and the same places in other depths.
        tau_sim, tau_info, tau_size: temperatures; 0 switches a factor off.
        one_step_ahead: 1 fuses the block's input and gives the block the reduced attention map of the full input
            (columns of a group summed, rows averaged; no fused kernel can use it), 2 fuses the input and recomputes
            attention from the fused tokens, 0 fuses the block's output by the block's own attention.
        bidirection: False moves all ``r`` from even to odd positions.
        pooling: value of a fused token: 1 mean weighted by size times attention received, 0 mean weighted by size,
            2 element-wise maximum, 3 plain mean. Sizes add up in every type.
        prop_attn: attention logits get log(size).
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1]; None leaves it to ``prop_attn``.
        floor: a count ``r`` is lowered where it would leave fewer tokens (protected ones included), and a share does
            nothing at or below it, as in the official code, which hard-codes 10. It does not limit ``keep``.
        keep: instead of ``r``: the patch tokens left after the last acting layer, a count or a ratio, reached by equal
            ratios. One layer can at most halve the tokens, so three layers reach one eighth; a limit that binds is
            reported.

    Decisions where the official code is a special case: protected tokens are excluded by position in both halves (the
    code masks the first rows of the even half only) and come first; where nothing is protected, tokens that stay are
    ascending all the same; for pooling 2 the rows of the reduced map are averaged by size, because a maximum of
    distributions is not one. Received attention is clamped at 1e-9 and carries no gradient.

    Raises ``ValueError`` for negative counts, a share of 1 or more, an unknown mode or pooling type, both ``r`` and
    ``keep``, or a layer that the model does not have.
    """

    r: int | float = _DEFAULT_R
    layers: tuple[int, ...] | None = None
    tau_sim: float = 1
    tau_info: float = 20
    tau_size: float = 40
    one_step_ahead: int = 1
    bidirection: bool = True
    pooling: int = 1
    prop_attn: bool = True
    floor: int = 10
    keep: int | float | None = None
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_size_bias(self.size_bias)
        if isinstance(self.r, bool) or not ((isinstance(self.r, int) and self.r >= 0) or 0 <= self.r < 1):
            raise ValueError(f"r is a number of tokens (int >= 0) or a share (float in [0, 1)), not {self.r!r}")
        check_either(self.keep, self.r != _DEFAULT_R)
        check_layers(self.layers, "layers")
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is a temperature > 0, or 0 for off, not {getattr(self, name)!r}")
        if self.one_step_ahead not in (0, 1, 2):
            raise ValueError(
                f"one_step_ahead is 0 (after the block), 1 (before it, map reused) or 2 (before it, map recomputed), "
                f"not {self.one_step_ahead!r}"
            )
        if self.pooling not in _POOLING:
            raise ValueError(
                f"pooling is 0 (by size), 1 (by size and attention), 2 (max) or 3 (plain mean), not {self.pooling!r}"
            )
        check_count(self.floor, "floor")

    # -- where -------------------------------------------------------------------------------------------------------
    @property
    def forwards_attention(self) -> bool:
        """Whether the block runs with the reduced map instead of attention of its own."""
        return self.one_step_ahead == 1

    def acting_position(self) -> str:
        return "before" if self.one_step_ahead else "after"

    def required(self) -> tuple[str, ...]:
        return self.needs if self.forwards_attention or self._weighs() else ()

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in stage_layers(self.layers, depth, "layers") and (self.keep is not None or self.r > 0)

    # -- how many ----------------------------------------------------------------------------------------------------
    def _amount(self, evidence: EncoderEvidence) -> int:
        n, free = evidence.n, evidence.free()
        if self.keep is not None:
            layers = stage_layers(self.layers, evidence.depth, "layers")
            wanted = most = free - staged(self.keep, evidence, layers) if evidence.layer in layers else 0
        elif self.r < 1:
            wanted, most = int(free * self.r), free if n > self.floor else 0
        else:
            wanted, most = int(self.r), n - self.floor
        r = max(0, min(wanted, most, _cap(evidence)))
        if r < wanted:
            evidence.note(
                f"mctf: {wanted} tokens to remove, {r} removed at layer {evidence.layer} "
                f"({n} tokens, {n - free} protected)",
                "mctf: some layers remove fewer tokens than asked for (half of the tokens, or floor); "
                "tr.record(model) notes where",
            )
        return r

    # -- which -------------------------------------------------------------------------------------------------------
    def _weighs(self) -> bool:
        return self.pooling == 1 or self.tau_info > 0

    def plan(self, evidence: EncoderEvidence) -> Plan:
        r = self._amount(evidence)
        if r == 0:
            return Identity.like(evidence.x)
        n, p = evidence.n, evidence.prefix
        received = self._received(evidence) if self._weighs() else None
        # Even (a) and odd (b) positions behind the prefix.
        position = torch.arange(n, device=evidence.x.device).expand(evidence.batch, -1)
        a, b = slice(p + p % 2, None, 2), slice(p + 1 - p % 2, None, 2)
        scores = self._scores(evidence, received, a, b)
        first = r // 2 if self.bidirection else r
        best, partner = scores.max(-1)
        order = descending(_empty_first(best, evidence, a))
        gone, stay = order[:, :first], order[:, first:].sort(dim=-1).values
        rest = stay.shape[1]
        if self.bidirection:
            again = scores.gather(1, stay.unsqueeze(-1).expand(-1, -1, scores.shape[2]))
            best, target = again.max(1)
            order = descending(_empty_first(best, evidence, b))
            moved, left = order[:, : r - first], order[:, r - first :]
            # Output of every b-token: its own behind the a-tokens, or that of the a-token which it went into.
            place = torch.arange(p + rest, p + rest + left.shape[1], device=left.device).expand_as(left)
            slot = torch.zeros_like(order).scatter(1, left, place).scatter(1, moved, p + target.gather(1, moved))
        else:
            moved = order[:, :0]
            left = torch.arange(scores.shape[2], device=order.device).expand(evidence.batch, -1)
            slot = p + rest + left
        dst = slot.gather(1, torch.cat([partner.gather(1, gone), moved], 1))
        at_a, at_b = position[:, a], position[:, b]
        keep = torch.cat([position[:, :p], at_a.gather(1, stay), at_b.gather(1, left)], 1)
        src = torch.cat([at_a.gather(1, gone), at_b.gather(1, moved)], 1)
        weights = received if self.pooling == 1 else None
        if evidence.valid is not None:
            present = evidence.valid.float()
            weights = present if weights is None else weights * present
        return Merge(n, keep, src, dst, weights=weights, **_POOLING[self.pooling])  # type: ignore[arg-type]

    def _received(self, evidence: EncoderEvidence) -> Tensor:
        """(B,N) mean attention that every token receives; taken from the map where the block needs it anyway."""
        if not self.forwards_attention:
            return _seen(received_attention(evidence).detach())
        rows = evidence.attention("all").detach()
        if evidence.valid is not None and rows.shape[2] == evidence.n:
            voters = evidence.valid.sum(1, keepdim=True).clamp(min=1)
            received = (rows * evidence.valid[:, None, :, None]).sum(2).mean(1) / voters
        else:
            received = rows.mean((1, 2))
        return _seen(received)

    def _scores(self, evidence: EncoderEvidence, received: Tensor | None, a: slice, b: slice) -> Tensor:
        """(B,A,B) float32 scores of all pairs; -inf where a token is protected or not there."""
        x = evidence.x.detach()
        scores = torch.ones(x.shape[0], x[:1, a].shape[1], x[:1, b].shape[1], device=x.device)
        if self.tau_sim:
            m = unit(x)
            cosine = inner(m[:, a], m[:, b])
            scores = scores * ((cosine + 1) / 2).clamp(min=0) ** (1 / self.tau_sim)
        for value, tau in ((received, self.tau_info), (evidence.size, self.tau_size)):
            if value is not None and tau:
                inverse = 1 / value.detach().float()
                if evidence.valid is not None:
                    inverse = inverse.masked_fill(~evidence.valid, 0.0)
                rarity = inverse / inverse.amax(1, keepdim=True)
                scores = scores * (rarity[:, a, None] * rarity[:, None, b]) ** (1 / tau)
        scores = finite(scores, evidence)
        # The prefix is outside of the slices; a mask of protected tokens is not.
        blocked = evidence.fixed() if evidence.masked else None
        if evidence.valid is not None:
            blocked = ~evidence.valid if blocked is None else blocked | ~evidence.valid
        if blocked is not None:
            scores = scores.masked_fill(blocked[:, a, None] | blocked[:, None, b], float("-inf"))
        return scores


def _seen(received: Tensor) -> Tensor:
    """Attention received, a little at least: a token that nobody attends to would have infinite rarity."""
    return received.clamp(min=1e-9)


def _empty_first(best: Tensor, evidence: EncoderEvidence, at: slice) -> Tensor:
    """Slots without a token go before tokens without a partner, whose features an empty slot would swallow."""
    if evidence.valid is None:
        return best
    return torch.where(evidence.valid[:, at], best, best.clamp(min=-1.0))


def _cap(evidence: EncoderEvidence) -> int:
    """The most that both steps can remove: as many pairs as there are unprotected even and odd tokens."""
    if not evidence.masked:
        return max(0, evidence.n - evidence.prefix) // 2
    fixed = evidence.fixed()
    assert fixed is not None
    return int(torch.minimum((~fixed[:, ::2]).sum(1), (~fixed[:, 1::2]).sum(1)).min())
