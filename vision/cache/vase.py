"""VaSE (arXiv 2606.03928): in long answers, keys with large values stay, and others by lot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.key_rows import carried
from tokenreduce.algorithms.keys import budget, candidates, check_finite, check_what, keep_slots, pooled
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import check_count, check_keep
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["VaSE"]

#: Added to weights, so that a draw never runs out of them.
_LEAST = 1e-30
#: Columns of the projection in mode "dkv".
_SKETCH = 20


@dataclass(frozen=True)
class VaSE(CacheReducer, name="vase", needs=("attention",), paper="2606.03928", title="VaSE"):
    """VaSE: the prompt stays whole; in decode, evict down to the budget whenever the cache is a multiple of a period.

    After a step that leaves a sample n slots, more than its budget b and a multiple of ``residual_length`` B, the last
    B stay, and K = b - B of those in front of them do. Each KV head chooses by itself.

    - ``mode="attnv"``: the first ``n_sink`` slots and those with the largest values (largest less smallest component),
      ``n_large`` together, stay. The others are drawn without replacement, with probabilities in proportion to the
      attention of the last B queries: softmax over the competing slots only, averaged over queries, pooled over 5
      neighbours with ``smooth``, and averaged over the query heads of a KV head.
    - ``mode="dkv"``: the K largest |kG|^2 |vG|^2 stay, and the sinks, with G 20 random columns, new at every eviction
      and the same for all heads and samples. Needs no attention.

    The cache swings between b and b + B. Short answers never reach that.

    Args:
        keep: the budget. With ``what="visual"``: visual keys that stay, of those that the prompt had; all text and all
            new tokens stay. With "all" as published: of all tokens seen, or a count.
        what: "visual" or "all".
        token_budget: instead of ``keep``, with ``what="all"``: b, a multiple of ``residual_length`` and more than it;
            2048 to 6144 in the scripts.
        residual_length: period B and number of last slots that stay.
        mode: "attnv" or "dkv".
        n_large: slots that stay for their values, sinks counted; by default a quarter of the budget, as the scripts'
            1024 of 4096 (the class has 200).
        n_sink: first slots that stay where they compete.
        draw: False takes the highest weights instead of drawing.
        magnitude: "range" as above, or "norm".
        smooth, temperature: of the attention; the scripts smooth.
        seed: of the draws. They depend on it, the layer, the step, the head and a slot's rank in its sample and on
            nothing else, so that a sample draws the same alone, in a batch and padded.

    Slots stay in the order of their positions. The code needs grouped queries and samples of equal length; here every
    sample has its own clock.

    Raises ``ValueError`` for numbers out of range, a budget that is no multiple of the period or not above it,
    ``token_budget`` with ``what="visual"``, and in a forward for an ``n_large`` that leaves nothing to draw.
    """

    keep: int | float = 0.25
    what: str = "visual"
    token_budget: int | None = None
    residual_length: int = 64
    mode: str = "attnv"
    n_large: int | None = None
    n_sink: int = 4
    draw: bool = True
    magnitude: str = "range"
    smooth: bool = False
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_what(self.what)
        check_count(self.residual_length, "residual_length", 1)
        check_count(self.n_sink, "n_sink")
        check_count(self.seed, "seed")
        for name, known in (("mode", ("attnv", "dkv")), ("magnitude", ("range", "norm"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {known[0]!r} or {known[1]!r}")
        if self.n_large is not None:
            check_count(self.n_large, "n_large")
        if not self.temperature > 0:
            raise ValueError(f"temperature is a number above 0, not {self.temperature!r}")
        b, period = self.token_budget, self.residual_length
        if b is not None:
            check_count(b, "token_budget", 1)
            if self.what != "all":
                raise ValueError("token_budget counts all keys; give what=all with it, or keep instead")
            if b % period or b <= period:
                raise ValueError(f"token_budget={b} is no multiple of residual_length={period} that is larger than it")
        elif self.what == "all" and isinstance(self.keep, int) and self.keep <= period:
            raise ValueError(f"keep={self.keep} is not larger than residual_length={period}, which always stays")

    def moment(self) -> str:
        return "never"

    def every(self) -> int:
        return 1

    def required(self) -> tuple[str, ...]:
        return () if self.mode == "dkv" else self.needs

    def query_rows(self) -> int:
        return self.residual_length

    def recent_queries(self) -> int:
        return self.residual_length if self.mode == "attnv" else 1

    def score(self, evidence: CacheEvidence) -> Tensor | None:
        """With a ratio of visual keys, at every slot how many of them the prompt had; nothing else is kept."""
        if self.what == "all" or isinstance(self.keep, int):
            return None
        return self._visual(evidence).float().expand(-1, evidence.n).contiguous()

    def _visual(self, evidence: CacheEvidence) -> Tensor:
        present = evidence.visual.sum(1, keepdim=True)
        return torch.maximum(carried(evidence, present), present)

    def _budget(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,1) slots that stay of those that the budget counts."""
        if self.token_budget is not None:
            return torch.full_like(evidence.counts, self.token_budget)
        if isinstance(self.keep, int):
            return budget(self.keep, candidates(evidence, self.what))
        whole = evidence.seen if self.what == "all" else self._visual(evidence)
        wanted = (self.keep * whole.double() + 0.5).long().clamp(min=1)
        return wanted.clamp(min=self.residual_length + self.n_sink) if self.what == "all" else wanted

    def plan(self, evidence: CacheEvidence) -> Plan:
        if not evidence.step:
            return Identity.like(evidence.keys)
        among, there, wanted = candidates(evidence, self.what), evidence.there, self._budget(evidence)
        due = (among.sum(1, keepdim=True) > wanted) & (evidence.counts % self.residual_length == 0)
        if not bool(due.any()):
            return Identity.like(evidence.keys)
        free = among & ~evidence.last(self.residual_length)
        room = (wanted - (among & ~free).sum(1, keepdim=True)).clamp(min=0)
        sinks = free & evidence.first(self.n_sink)
        chosen = self._attnv if self.mode == "attnv" else self._dkv
        stay = chosen(evidence, free, sinks, room, wanted, due) | (there & ~free)
        return keep_slots(torch.where(due, stay, there), evidence)

    def _attnv(
        self, evidence: CacheEvidence, free: Tensor, sinks: Tensor, room: Tensor, wanted: Tensor, due: Tensor
    ) -> Tensor:
        if self.n_large is None:
            reserved = torch.minimum(wanted // 4, room)
        else:
            reserved = torch.full_like(room, self.n_large)
            if bool((due & (reserved >= room)).any()):
                raise ValueError(
                    f"n_large={self.n_large} leaves nothing to draw of the {int(room[due].min())} slots in front of "
                    f"the last {self.residual_length}; give a smaller one, or a larger budget"
                )
        reserved = torch.minimum(torch.maximum(reserved, sinks.sum(1, keepdim=True)), room)
        values = evidence.values.float()
        large = values.amax(-1) - values.amin(-1) if self.magnitude == "range" else values.norm(dim=-1)
        check_finite(large, free & due)
        stay = best(large.masked_fill(sinks, float("inf")), free, reserved)
        weights = (self._weights(evidence, free) + _LEAST).log()
        check_finite(weights, free & due)
        if self.draw:
            weights = weights - (-self._lots(evidence).log()).log()
        # Weights as logarithms with Gumbel noise: the highest are a draw without replacement.
        return stay | best(weights, free & ~stay, room - reserved)

    def _weights(self, evidence: CacheEvidence, free: Tensor) -> Tensor:
        """(B*Hkv,N) double: attention of the last queries on the slots ``free``, over them only."""
        known = evidence.rows_given
        if not known:
            evidence.rows()
        rows = min(self.residual_length, known)
        logits = evidence.logits(known - rows, known) / self.temperature
        got = logits.masked_fill(~free[:, None, None], float("-inf")).softmax(-1)
        real = evidence.row_there(rows) & free.any(1, keepdim=True)
        got = got.masked_fill(~real[:, None, :, None], 0.0).sum(2) / real.sum(1).clamp(min=1)[:, None, None]
        if self.smooth:  # over neighbours among the competing slots, whatever lies between them
            order = (~free).long().argsort(dim=1, stable=True)[:, None].expand_as(got)
            got = torch.zeros_like(got).scatter(2, order, pooled(got.gather(2, order), 5, "avgpool"))
        return got.mean(1).double()

    def _lots(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,N) double in (0,1): random numbers by rank of a slot in its head."""
        lots = torch.rand(evidence.n, evidence.kv_heads, dtype=torch.double, generator=self._generator(evidence))
        rank = (evidence.there.long().cumsum(1) - 1).clamp(min=0)
        head = torch.arange(len(rank), device=rank.device)[:, None] % evidence.kv_heads
        return lots.to(rank.device)[rank, head].clamp(1e-300, 1 - 1e-16)

    def _generator(self, evidence: CacheEvidence) -> torch.Generator:
        key = (self.seed * 1_000_003 + evidence.layer) * 1_000_003 + evidence.step
        return torch.Generator().manual_seed(key % (1 << 63))

    def _dkv(
        self, evidence: CacheEvidence, free: Tensor, sinks: Tensor, room: Tensor, wanted: Tensor, due: Tensor
    ) -> Tensor:
        generator, parts = self._generator(evidence), {}
        scores = torch.ones(free.shape, device=free.device)
        for x in (evidence.keys, evidence.values):
            d = x.shape[-1]
            if d not in parts:
                parts[d] = torch.randn(d, _SKETCH, generator=generator).to(x.device) / _SKETCH**0.5
            scores = scores * (x.float() @ parts[d]).square().sum(-1)
        check_finite(scores, free & due)
        return best(scores.masked_fill(sinks, float("inf")), free, room)
