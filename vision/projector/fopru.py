"""FoPru (arXiv 2411.14164): keep the tokens, or the rows, that stand out most in the attention between patches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenreduce.algorithms.projector import Projector, check_layer, kept, top
from tokenreduce.algorithms.scoring import finite
from tokenreduce.core.evidence import Look, VisualEvidence
from tokenreduce.core.plan import Identity, Plan

__all__ = ["DIRECTIONS", "SCORE_INPUTS", "STRATEGIES", "FoPru"]

STRATEGIES = ("rank", "row")
DIRECTIONS = ("auto", "received", "given")
SCORE_INPUTS = ("softmax", "logits")
CHUNK = 256


@dataclass(frozen=True)
class FoPru(Projector, name="fopru", needs=("tower",), paper="2411.14164", title="FoPru"):
    """FoPru: focal pruning by attention between patches in one block, averaged over heads; raster order.

    There is no official code. This follows the published formulas; that the input of the variance test is softmax
    attention is an assumption. Class token and registers are left out, as queries and as keys, without normalising
    again. A token's significance is the mean attention that it receives or gives, whichever varies more over the view
    (unbiased variance; a tie takes "given"). After softmax, what a token gives to all patches is nearly constant, so
    "received" wins practically always; with ``score_input="logits"`` there is a real choice. Tokens made of several
    patches take their mean.

    Rows of attention that were given to the evidence in place of queries and keys stand for the queries; "given" then
    needs all of them.

    Args:
        keep: 0.25 in the paper; ratios are rounded half up.
        strategy: "rank" keeps the most significant tokens; "row" the rows of the grid with the highest sums, as many
            as fit into ``keep`` and at least one, so that less than ``keep`` may be left, or all of one row.
        direction: "auto", "received" or "given".
        score_input: "softmax" or "logits".
        layer: block of the tower that is read: a 0-based index (negative from the end), a share of its depth (float),
            or None for the block whose output enters the projector, as published.
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these, and for "row" where rows differ in length.
    """

    keep: int | float = 0.25
    strategy: str = "rank"
    direction: str = field(default="auto", kw_only=True)
    score_input: str = field(default="softmax", kw_only=True)
    layer: int | float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        for name, known in (
            ("strategy", STRATEGIES), ("direction", DIRECTIONS), ("score_input", SCORE_INPUTS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {known}, not {getattr(self, name)!r}")

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.layer,)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        scores = self.significance(evidence)
        return kept(top(scores, keep), evidence) if self.strategy == "rank" else self._rows(scores, evidence, keep)

    def significance(self, evidence: VisualEvidence) -> Tensor:
        """(B,N) float32 scores of the tokens behind the prefix."""
        seen = evidence.tower(self.layer)
        both = seen.per_token(self._softmax if self.score_input == "softmax" else _logits)[:, seen.prefix :]
        received, given = finite(both, evidence).unbind(-1)
        if self.direction != "auto":
            return received if self.direction == "received" else given
        return torch.where(received.var(1, keepdim=True) > given.var(1, keepdim=True), received, given)

    def _softmax(self, patches: VisualEvidence) -> Tensor:
        """(B,N,2) attention that every patch receives and gives; 0 for class token and registers."""
        p, n = patches.prefix, patches.n
        out = patches.x.new_zeros(patches.batch, n, 2, dtype=torch.float32)
        there = _there(patches)
        count = there.sum(1, keepdim=True)
        if (rows := patches.attention.given) is not None and rows.shape[2] != n:
            if self.direction == "given":
                raise ValueError(
                    f"direction='given' needs the attention of all {n} tokens, and the evidence has {rows.shape[2]} "
                    "rows: give Evidence(queries=..., keys=...)"
                )
            out[:, p:, 0] = rows.float()[..., p:].mean((1, 2))
            return out
        for start in range(p, n, CHUNK):
            at = slice(start, min(start + CHUNK, n))
            if rows is None:
                part = patches.attention(torch.arange(at.start, at.stop, device=out.device))
            else:
                part = rows[:, :, at].float()
            part = part.mean(1)[..., p:].masked_fill(~there[:, at.start - p : at.stop - p, None], 0.0)
            out[:, p:, 0] += part.sum(1) / count
            out[:, at, 1] = part.sum(2) / count
        return out

    def _rows(self, scores: Tensor, evidence: VisualEvidence, keep: int) -> Plan:
        _, row, width = evidence.place[:, 0].to(scores.device).unique(return_inverse=True, return_counts=True)
        if bool((width != width[0]).any()):
            raise ValueError(f"strategy='row' needs rows of one length, not {width.tolist()}; take strategy='rank'")
        wanted = max(1, keep // int(width[0]))
        if wanted == len(width):
            return Identity.like(evidence.x)
        sums = scores.new_zeros(len(scores), len(width)).index_add(1, row, scores)
        stays = torch.zeros_like(sums, dtype=torch.bool).scatter(1, top(sums, wanted), True)[:, row]
        return kept(stays.nonzero()[:, 1].view(len(scores), -1), evidence)


def _there(patches: VisualEvidence) -> Tensor:
    """(B,N) bool behind the prefix."""
    if patches.valid is not None:
        return patches.valid[:, patches.prefix :]
    return torch.ones_like(patches.x[:, patches.prefix :, 0], dtype=torch.bool)


def _logits(patches: VisualEvidence) -> Tensor:
    """(B,N,2) means of the scaled products q·k that every patch receives and gives. A mean of products with one vector
    is the product with a mean, so no map is needed."""
    q, k = patches.attention.used
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    q = q.float() * patches.attention.factor
    p = patches.prefix
    there = _there(patches)[:, None, :, None]
    count = there.sum(2, keepdim=True)

    def mean(t: Tensor) -> Tensor:
        return t[:, :, p:].masked_fill(~there, 0.0).sum(2, keepdim=True) / count

    return torch.stack([(mean(q) * k).sum(-1).mean(1), (q * mean(k)).sum(-1).mean(1)], -1)
