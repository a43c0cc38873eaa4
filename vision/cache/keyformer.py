"""Keyformer (arXiv 2403.09054): key tokens by attention with Gumbel noise, behind a recent window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.algorithms.baseline import mixed_seed, scramble
from tokenreduce.algorithms.decode_scorer import Accumulating, part
from tokenreduce.algorithms.keys import check_finite, keep_slots, standing
from tokenreduce.algorithms.sequence import best
from tokenreduce.core.budget import Keep, check_count
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["Keyformer"]

#: Rows of attention with noise that are computed at once.
_BLOCK = 256


@dataclass(frozen=True)
class Keyformer(Accumulating, name="keyformer", needs=("attention",), paper="2403.09054", title="Keyformer"):
    """Keyformer: as H2O, but what adds up is softmax((logits + noise) / tau), with standard Gumbel noise for every
    query and key, and a temperature that rises from ``tau_init`` at the prompt to ``tau_end`` while decoding.

    Scores are summed over all queries and averaged over the query heads of a KV head. With ``what="all"``, ``recent``
    percent of the budget are the last tokens, and in front of them the keys with the largest scores stay; the cut is
    made again behind every decode step. With ``what="visual"`` all text stays, the budget goes to visual keys and
    nothing goes while decoding. Positions stay as they were, which the paper found better than renumbering.

    Noise is a hash of ``seed``, layer, step, head and the places of query and key among the real tokens: the same for a
    sample alone and in a batch, padded or not, on every device. Samples of a batch have the same noise.

    Args:
        keep: keys of every KV head that stay of those that ``what`` counts; 60 % as in the code.
        what, interval: see :class:`~tokenreduce.vision.cache.h2o.H2O`.
        kv_cache: instead of ``keep``, with ``what="all"``: the budget in percent of the prompt, rounded down; at least
            one key, where the code keeps none.
        recent: percent of the budget that is the recent window, rounded down (20 to 30 recommended).
        tau_init, tau_end: temperatures, above 0; tau grows by (tau_end - tau_init) / max_new_tokens a step, and stays
            at tau_end from then on.
        max_new_tokens: steps until tau_end; the number that is generated.
        seed: another seed, other noise.
        compete: whether the token that leaves the window competes for a place among the key tokens, as in the paper.
            False is the authors' code, where it is let go, so that key tokens are those of the prompt for good; its
            cache holds one key less than the budget until the next token is there. It needs
            ``kv_cache``.

    The code sums over the batch and knows no grouped queries; samples are separate here. Its evaluation script raises
    tau by the whole difference in every step; the generation script is followed.

    Raises ``ValueError`` for values other than these, and in a forward for a budget below 2 with ``compete=False``.
    """

    keep: int | float = 0.6
    kv_cache: float | None = None
    recent: float = 30.0
    tau_init: float = 1.0
    tau_end: float = 2.0
    max_new_tokens: int = 128
    seed: int = 0
    compete: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 100:
            raise ValueError(f"recent is percent of the budget, 0 to 100, not {self.recent!r}")
        for name in ("tau_init", "tau_end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a number above 0, not {getattr(self, name)!r}")
        check_count(self.max_new_tokens, "max_new_tokens", 1)
        check_count(self.seed, "seed")
        if self.kv_cache is not None and not 0 < self.kv_cache <= 100:
            raise ValueError(f"kv_cache is percent of the prompt, above 0 and at most 100, not {self.kv_cache!r}")
        if self.kv_cache is not None and self.what != "all":
            raise ValueError("kv_cache counts all keys of a head; give what=all with it, or keep instead")
        if not self.compete and self.kv_cache is None:
            raise ValueError("compete=false is the cut of the authors' code: give what=all and kv_cache with it")

    # -- the score -------------------------------------------------------------------------------------------------
    def gained(self, evidence: CacheEvidence) -> Tensor:
        known, there = evidence.rows_given, evidence.there
        if not known:
            evidence.rows()  # says what is missing
        steps = min(evidence.step, self.max_new_tokens) / self.max_new_tokens
        tau = self.tau_init + steps * (self.tau_end - self.tau_init)
        gone = ~evidence.row_there()
        out = torch.zeros(evidence.keys.shape[:2], device=evidence.keys.device)
        for start in range(0, known, _BLOCK):
            stop = min(start + _BLOCK, known)
            width = evidence.reach(stop)
            logits = evidence.logits(start, stop, width=width).masked_fill_(
                ~there[:, None, None, :width], float("-inf")
            )
            rows = logits.add_(self._noise(evidence, start, stop, width)).div_(tau).softmax(-1)
            out[:, :width] += rows.masked_fill_(gone[:, None, start:stop, None], 0.0).sum(2).mean(1)
        return out

    def _noise(self, evidence: CacheEvidence, start: int, stop: int, width: int | None = None) -> Tensor:
        """(B*Hkv,G,R,N) standard Gumbel noise."""
        place = evidence.there.long().cumsum(1)
        first = mixed_seed(self.seed, evidence.layer + 1, evidence.step)
        head = torch.arange(evidence.kv_heads * evidence.groups, device=place.device) ^ first
        head = scramble(head).view(evidence.kv_heads, -1).repeat(evidence.batch, 1)
        row = place[:, evidence.n - evidence.rows_given :][:, start:stop]
        # Row and column are mixed well by themselves, so that a short hash does for the many pairs of them.
        state = scramble(head[:, :, None] ^ row[:, None]).unsqueeze(-1) ^ scramble(place)[:, None, None, :width]
        state.mul_(0x45D9F3B).bitwise_and_(0xFFFFFFFF)
        state.bitwise_xor_(state >> 15).mul_(0x2C1B3C6D).bitwise_right_shift_(20).bitwise_and_(0x7FFFFF)
        uniform = state.float().add_(0.5).div_(2**23)  # 23 bits, so that neither 0 nor 1 comes up
        return uniform.log_().neg_().log_().neg_()

    # -- the cut ---------------------------------------------------------------------------------------------------
    def capacity(self, evidence: CacheEvidence) -> Keep | Tensor:
        if self.kv_cache is None:
            return super().capacity(evidence)
        if not evidence.step:
            return (evidence.counts.double() * self.kv_cache / 100).long().clamp(min=1)
        held = standing(self.kv_cache / 100, evidence)
        assert isinstance(held, Tensor)
        return held if self.compete or self.kv_cache == 100 else held + 1

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        if self.what != "all":
            return None
        return evidence.last(part(self.capacity(evidence), self.recent / 100, evidence))

    def plan(self, evidence: CacheEvidence) -> Plan:
        return super().plan(evidence) if self.compete else self._coded(evidence)

    def _coded(self, evidence: CacheEvidence) -> Plan:
        """What the authors' code keeps for the next step: of the window one less, since it counts the coming token,
        and key tokens from in front of the whole window."""
        if self.kv_cache == 100:
            return Identity.like(evidence.keys)
        total = self.capacity(evidence)
        assert isinstance(total, Tensor)
        if bool(((total < 2) & evidence.there.any(1, keepdim=True)).any()):
            raise ValueError("compete=false holds one key less than the budget, which leaves none of 1; give more")
        window = (total.double() * (self.recent / 100) + 1e-9).long()
        scores, old = self.importance(evidence), evidence.there & ~evidence.last(window)
        check_finite(scores, old)
        keys = torch.where(window > 0, total - window, total - 1)
        return keep_slots(best(scores, old, keys) | evidence.last((window - 1).clamp(min=0)), evidence)
