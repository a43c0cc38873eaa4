"""PiToMe (arXiv 2405.16148): merge inside large clusters of similar tokens, protect the tokens outside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenreduce.algorithms.matching import bipartite
from tokenreduce.algorithms.scoring import descending, excluded, finite, inner, key_metric, unit
from tokenreduce.core.budget import check_keep, geometric
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.host import counted_rows, on_host, values
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.reducer import Reducer, check_size_bias

__all__ = ["PiToMe"]

#: Tokens whose energy is worked out at once on the CPU.
_ROWS = 256


class Preset(NamedTuple):
    """What the authors use for one family of models: ``margin`` falls by ``fall`` over the depth.

    These two are text, since a compiled graph may take floats of a module for inputs.
    """

    margin: str
    fall: str
    early: str = "split"  # matching of the first layers: energy, split or tome
    late: str = "energy"
    metric: str = "keys"
    first: int | None = None  # number of early layers, half of the depth (rounded up) by default
    site: str = "middle"
    by_size: bool = True
    prop_attn: bool = False


PRESETS = {
    "deit": Preset("0.75", "0.75"),
    "augreg": Preset("0.9", "0.9"),
    "mae": Preset("0.75", "0.75", early="energy", late="split"),
    "clip": Preset("0.95", "0.95", early="energy", metric="x"),
    "clip_hf": Preset("0.9", "0.9", early="tome", metric="x", first=13, site="after", by_size=False),
    "blip": Preset("0.9", "0.9", early="energy", metric="x"),
    "blip2": Preset("0.75", "0.4", early="energy", prop_attn=True),
}


@dataclass(frozen=True)
class PiToMe(Reducer, name="pitome", needs=("keys",), paper="2405.16148", title="PiToMe"):
    """PiToMe: tokens with many similar ones (high energy) are paired and merged, the others are left alone.

    The energy of token i is the mean over all tokens j of ELU(cos(i,j) - margin). Matching "energy" merges the r
    tokens at even places among the 2r of highest energy into their best match among those at odd places; "split"
    divides all tokens by the parity of their energy rank and merges the r most similar pairs as ToMe does; "tome" is
    ToMe's own matching.

    Args:
        ratio: share of the patch tokens that every layer keeps; floor(T - T*ratio) of T are removed, computed with a
            tolerance of 1e-6 so that whole numbers are not missed. At most floor(T/2) can go; more is clamped and
            reported.
        keep: instead of ``ratio``: patch tokens left after the last layer, a count or a ratio, by equal ratios.
        margin: threshold m of the energy, m*(1 - layer/depth); a pair (m, s) is m - s*layer/depth, (m, 0) constant.
            By default that of the preset.
        alpha: scale of the ELU's negative part.
        preset: "deit" (margin 0.75; first half of the layers, rounded up, "split", then "energy"), "augreg" (0.9,
            same), "mae" (0.75, the reverse), "clip" (0.95, "energy", compares features), "clip_hf" (0.9, layers 0 to
            12 "tome", then "energy", compares features after the MLP, plain means), "blip" (0.9, "energy",
            compares features), "blip2" (0.75 - 0.4*layer/depth, "energy").
        metric: "keys" (averaged over heads) or "x" (features); by default that of the preset.
        prop_attn: proportional attention. None is that of the preset: on for "blip2", off for the others, where the
            authors' code tracks sizes but never passes them on.
        size_bias: the power of sizes by which keys count, instead of ``prop_attn``: "log" (1), "sqrt" (1/2), "none" or
            a number in [0, 1].

    Decisions: all prefix tokens are protected, not only the class token; the energy subtracts the margin as the code
    does (the paper's text keeps the cosine where it is above the margin); "tome" counts the prefix in T as the code
    does; ``keep`` uses the same number of tokens in every matching.

    Raises ``ValueError`` for settings outside these values or when both ``ratio`` and ``keep`` are given.
    """

    ratio: float = 1.0
    keep: int | float | None = None
    margin: float | tuple[float, float] | None = None
    alpha: float = 1.0
    preset: str = "deit"
    metric: str | None = None
    prop_attn: bool | None = None
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_size_bias(self.size_bias)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is the share kept per layer, in (0, 1], not {self.ratio!r}")
        if self.keep is not None and self.ratio != 1:
            raise ValueError("give ratio or keep, not both")
        if self.preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}, not {self.preset!r}")
        if self.metric not in (None, "keys", "x"):
            raise ValueError(f"metric is 'keys' or 'x', not {self.metric!r}")
        if isinstance(self.margin, list):
            object.__setattr__(self, "margin", tuple(self.margin))
        numbers = self.margin if isinstance(self.margin, tuple) else (0 if self.margin is None else self.margin, 0)
        if len(numbers) != 2 or any(isinstance(m, bool) or not isinstance(m, int | float) for m in numbers):
            raise ValueError(f"margin is a number m or a pair (m, s) for m - s*layer/depth, not {self.margin!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or self.alpha < 0:
            raise ValueError(f"alpha is a number >= 0, not {self.alpha!r}")

    @property
    def proportional(self) -> bool:
        return PRESETS[self.preset].prop_attn if self.prop_attn is None else self.prop_attn

    def acts_at(self, layer: int, depth: int) -> bool:
        return self.keep is not None or self.ratio < 1

    def acting_position(self) -> str:
        return PRESETS[self.preset].site

    def required(self) -> tuple[str, ...]:
        return ("keys",) if self._metric() == "keys" else ()

    def plan(self, evidence: EncoderEvidence) -> Plan:
        family = PRESETS[self.preset]
        early = math.ceil(evidence.depth / 2) if family.first is None else family.first
        matching = family.early if evidence.layer < early else family.late
        r = self._amount(evidence, evidence.n if matching == "tome" else evidence.free())
        if r <= 0:
            return Identity.like(evidence.x)
        metric = evidence.x if self._metric() == "x" else key_metric(evidence)
        if matching == "tome":
            return bipartite(metric, r, evidence, weights=_real(evidence), by_size=family.by_size)
        return self._merge(metric, r, evidence, matching == "split", family.by_size)

    def _metric(self) -> str:
        return self.metric or PRESETS[self.preset].metric

    def _margin(self, evidence: EncoderEvidence) -> float:
        family = PRESETS[self.preset]
        m = (float(family.margin), float(family.fall)) if self.margin is None else self.margin
        start, fall = m if isinstance(m, tuple) else (m, m)
        return start - fall * evidence.layer / evidence.depth

    def _amount(self, evidence: EncoderEvidence, total: int) -> int:
        free = evidence.free()
        if self.keep is None:
            r = math.floor(total - total * self.ratio + 1e-6)
        elif free:
            entry = evidence.entry - (evidence.n - free)
            r = free - geometric(self.keep, entry, evidence.layer, evidence.depth)
        else:
            r = 0
        if r > free // 2:
            evidence.note(
                f"{self.name}: {r} of {free} tokens clamped to {free // 2} at layer {evidence.layer}",
                f"{self.name}: a layer removes at most half of its tokens; more was asked for. Raise ratio or keep.",
            )
        return min(r, free // 2)

    def _merge(self, metric: Tensor, r: int, evidence: EncoderEvidence, split: bool, by_size: bool) -> Plan:
        n, p = evidence.n, evidence.prefix
        m, out = unit(metric[:, p:]), excluded(evidence)
        cosine = inner(m, m)
        if out is None and on_host(cosine):
            return self._merge_on_host(cosine, r, evidence, split, by_size)
        order = descending(self._energy(cosine, out, evidence))
        if out is not None:
            cosine = cosine.masked_fill(out[:, :, None] | out[:, None], float("-inf"))
            # A lone real token becomes a destination, or it would be merged into a slot that is not there.
            lone = (~out).sum(1, keepdim=True) == 1
            order = torch.where(lone, order.roll(1, 1), order)
        pool = order if split else order[:, : 2 * r]
        a, b = pool[:, ::2], pool[:, 1::2]
        rows = cosine.gather(1, a.unsqueeze(-1).expand(-1, -1, m.shape[1]))
        best, partner = rows.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1)).max(-1)
        rest = order[:, pool.shape[1] :]
        if split:
            rank = descending(best)
            rest, a, partner = a.gather(1, rank[:, r:]), a.gather(1, rank[:, :r]), partner.gather(1, rank[:, :r])
        lead = torch.arange(p, device=m.device).expand(m.shape[0], -1)
        keep = torch.cat([lead, p + rest, p + b], 1)
        return Merge(n, keep, p + a, p + rest.shape[1] + partner, weights=_real(evidence), by_size=by_size)

    def _merge_on_host(self, cosine: Tensor, r: int, evidence: EncoderEvidence, split: bool, by_size: bool) -> Plan:
        """The rest of :meth:`_merge` with indices in numpy, where every token behind the prefix takes part."""
        n, p, batch = evidence.n, evidence.prefix, len(cosine)
        sample = counted_rows(batch)
        order = np.argsort(-values(self._energy(cosine, None, evidence)), axis=1, kind="stable")
        pool = order if split else order[:, : 2 * r]
        a, b, rest = pool[:, ::2], pool[:, 1::2], order[:, pool.shape[1] :]
        pairs = (sample[:, :, None].copy(), a[:, :, None], b[:, None])
        similarity, partners = cosine[tuple(map(torch.from_numpy, pairs))].max(-1)
        best, partner = values(similarity), values(partners)
        if split:
            rank = np.argsort(-best, axis=1, kind="stable")
            ranked = a[sample, rank]
            rest, a, partner = ranked[:, r:], ranked[:, :r], partner[sample, rank[:, :r]]
        keep = np.concatenate([np.broadcast_to(np.arange(p), (batch, p)), p + rest, p + b], 1)
        return Merge.of_arrays(n, keep, p + a, p + rest.shape[1] + partner, by_size=by_size)

    def _energy(self, cosine: Tensor, out: Tensor | None, evidence: EncoderEvidence) -> Tensor:
        """(B,T); tokens that take no part neither contribute nor rank."""
        margin = self._margin(evidence)
        if out is None and cosine.shape[1] > _ROWS and on_host(cosine):  # no second map is held
            parts = [F.elu_(rows - margin, alpha=self.alpha).mean(-1) for rows in cosine.split(_ROWS, 1)]
            return finite(torch.cat(parts, 1), evidence)
        each = F.elu(cosine - margin, alpha=self.alpha)
        if out is None:
            return finite(each.mean(-1), evidence)
        each = each.masked_fill(out[:, None], 0.0).sum(-1) / (~out).sum(-1, keepdim=True).clamp(min=1)
        return finite(each, evidence).masked_fill(out, float("-inf"))


def _real(evidence: EncoderEvidence) -> Tensor | None:
    return None if evidence.valid is None else evidence.valid.float()
