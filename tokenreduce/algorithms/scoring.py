"""Scores that several methods share. Everything is computed in float32, per sample, without a batch-wide decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenreduce.core.evidence import Attention, BaseEvidence, CacheEvidence, VisualEvidence
from tokenreduce.core.host import not_a_number, on_host, values
from tokenreduce.core.readable import readable, to_onnx

__all__ = [
    "ascending", "attention_paid", "attention_received", "clean", "cls_attention", "cls_logits", "descending",
    "distances", "excluded", "finite", "gram", "highest", "importance", "inner", "key_metric", "question",
    "received_attention", "received_by_head", "relevance", "select", "unit",
]  # fmt: skip

#: Rows from which half of a Gram matrix is worth the copies that spare the other half.
_GRAM = 256
#: Numbers up to which one core looks at them faster than torch has called several.
_SMALL = 1 << 15


def inner(a: Tensor, b: Tensor) -> Tensor:
    """(B,M,N) inner products of (B,M,d) and (B,N,d) in float32, also under autocast: a rounded ranking is another."""
    if a.is_meta or not torch.is_autocast_enabled(a.device.type):  # there is no autocast on meta, and asking raises
        return torch.bmm(a.float(), b.float().transpose(1, 2))
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.float(), b.float().transpose(1, 2))


def gram(x: Tensor) -> Tensor:
    """(B,N,N) inner products of the rows of ``x`` (B,N,d) with each other in float32, also under autocast.

    On the CPU the upper half of large ones is copied from the lower half instead of computed.
    """
    n = x.shape[1]
    if n < _GRAM or not _checked(x) or x.requires_grad:
        return inner(x, x)
    x = x.float()
    turned, step = x.transpose(1, 2), -(-n // 4)
    out = x.new_empty(x.shape[0], n, n)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, n, step):
            end = min(start + step, n)
            rows = x[:, start:end] @ turned[:, :, :end]
            out[:, start:end, :end] = rows
            out[:, :start, start:end] = rows[:, :, :start].transpose(1, 2)
    return out


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, float32; an all-zero vector stays zero instead of becoming NaN."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)


def distances(x: Tensor) -> Tensor:
    """(B,N,N) Euclidean distances between the rows of ``x`` (B,N,C) in float32, exactly 0 on the diagonal.

    The mean is taken out first: large common components would cost the small distances their digits.
    """
    x = x.detach().float()
    x = x - x.mean(1, keepdim=True)
    eye = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    if to_onnx():  # has no cdist; this is how cdist computes more than 25 points
        power = x.square().sum(-1)
        apart = (power.unsqueeze(2) + power.unsqueeze(1) - 2 * inner(x, x)).clamp(min=0).sqrt()
    else:
        apart = torch.cdist(x, x)
    return apart.masked_fill(eye, 0.0)


def finite(scores: Tensor, evidence: BaseEvidence | CacheEvidence) -> Tensor:
    """``scores`` itself; raises ``ValueError`` when they hold NaN.

    Checked in eager mode on the CPU, where it costs nothing. Elsewhere (a check would stall the GPU, break a compiled
    graph, or ask ``vmap`` for a value) NaN is replaced by the lowest score: no decision is made on it and the model's
    output stays NaN.
    """
    if _checked(scores):
        if scores.numel() <= _SMALL and scores.dtype == torch.float32 and on_host(scores):
            refuse_nan(values(scores), evidence)
        elif bool(scores.isnan().any()):
            raise _nan(evidence)
        return scores
    return torch.where(scores.isnan(), float("-inf"), scores)


def refuse_nan(scores: Any, evidence: BaseEvidence | CacheEvidence) -> None:
    """:func:`finite` for an array."""
    if not_a_number(scores):
        raise _nan(evidence)


def _nan(evidence: BaseEvidence | CacheEvidence) -> ValueError:
    return ValueError(
        f"NaN in the tokens at layer {evidence.layer}: the input or the weights hold NaN or overflow; "
        "check the preprocessing, or run in float32 or bfloat16"
    )


def _checked(values: Tensor) -> bool:
    return values.device.type == "cpu" and readable(values)


def clean(x: Tensor, evidence: BaseEvidence) -> Tensor:
    """Vectors ``x`` (B,N,d) without NaN: as :func:`finite`, but where that cannot raise, NaN becomes 0."""
    finite(x.sum(-1), evidence)
    return x if _checked(x) else x.nan_to_num()


def descending(scores: Tensor) -> Tensor:
    """Indices that sort (B,N) from high to low; ties keep the lower index first, so that results are reproducible."""
    return _order(scores, True)


def ascending(scores: Tensor) -> Tensor:
    """Indices that sort (B,N) from low to high; ties keep the lower index first."""
    return _order(scores, False)


def _order(scores: Tensor, downwards: bool) -> Tensor:
    # ONNX has no stable sort by name, but defines that its TopK, which a plain sort becomes, keeps ties in order.
    if to_onnx():
        return scores.sort(dim=-1, descending=downwards).indices
    return scores.argsort(dim=-1, descending=downwards, stable=True)


def highest(scores: Tensor, k: int) -> Tensor:
    """(...,N) bool: the ``k`` <= N highest of every row of ``scores``, ties to the lower index; a sort for less."""
    if k < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    out = scores >= least
    if _checked(scores) and out.sum() == k * (scores.numel() // max(scores.shape[-1], 1)):
        return out
    above, level = scores > least, scores == least
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def key_metric(evidence: BaseEvidence) -> Tensor:
    """(B,N,d) keys averaged over heads: the similarity metric of ToMe and its successors."""
    return evidence.keys.mean(1)


def attention_paid(attention: Attention) -> Tensor:
    """(B,N) attention that the class token pays to every token, averaged over heads."""
    return attention("cls")[:, :, 0].mean(1)


def cls_attention(evidence: BaseEvidence) -> Tensor:
    """:func:`attention_paid` in ``evidence``."""
    return attention_paid(evidence.attention)


def cls_logits(evidence: BaseEvidence) -> Tensor:
    """(B,N) logits of the class token's attention row before softmax, averaged over heads.

    Where softmax rows were given these are their logarithms: the logits less a constant, in the same order.
    """
    attention = evidence.attention
    if attention.given is not None:
        rows = attention("cls")[:, :, 0]
        return rows.clamp(min=torch.finfo(rows.dtype).tiny).log().mean(1)
    if not evidence.cls:
        raise ValueError("the model has no class token to take attention from")
    joined = attention.joined()  # the sum over heads is one product of full width
    scale = attention.factor / attention.heads
    return inner(joined.queries[:, 0, :1], joined.keys[:, 0])[:, 0] * scale


def received_by_head(attention: Attention, chunk: int = 128) -> Tensor:
    """(B,H,N) attention that every token receives in each head, averaged over queries.

    Rows are computed ``chunk`` at a time, so that no N x N map is ever held. Queries that are not there do not vote.
    """
    if attention.given is not None:
        return attention("all").mean(2)
    n, valid = attention.keys.shape[2], attention.valid
    total: Tensor | None = None
    for start in range(0, n, chunk):
        rows = attention.between(start, min(start + chunk, n))
        if valid is not None:
            rows = rows * valid[:, None, start : start + chunk, None]
        total = rows.sum(2) if total is None else total + rows.sum(2)
    assert total is not None
    return total / (n if valid is None else valid.sum(1)[:, None, None])


def attention_received(attention: Attention, chunk: int = 128) -> Tensor:
    """(B,N) attention that every token receives, averaged over heads and queries; see :func:`received_by_head`."""
    return received_by_head(attention, chunk).mean(1)


def received_attention(evidence: BaseEvidence, chunk: int = 128) -> Tensor:
    """:func:`attention_received` in ``evidence``."""
    return attention_received(evidence.attention, chunk)


def importance(evidence: BaseEvidence) -> Tensor:
    """(B,N) attention from the class token, or, in a model without one, the mean attention received."""
    return cls_attention(evidence) if evidence.cls else received_attention(evidence)


def excluded(evidence: BaseEvidence) -> Tensor | None:
    """(B, N-prefix) bool of the tokens behind the prefix that take no part: protected by a mask, or not there.

    None in the usual case that protection is a count and every token is real.
    """
    p = evidence.prefix
    out = evidence.fixed() if evidence.masked else None
    if evidence.valid is not None:
        out = ~evidence.valid if out is None else out | ~evidence.valid
    return None if out is None else out[:, p:]


def select(scores: Tensor, k: int, evidence: BaseEvidence, *, by_score: bool = False) -> Tensor:
    """(B, prefix+k) indices: protected tokens first, then the ``k`` best others in position or score order.

    Tokens that are not there (``evidence.valid``) come last. ``scores`` is (B,N); higher stays.
    """
    if scores.dtype == torch.float32 and on_host(scores, evidence.valid):
        return _select_on_host(values(scores), k, evidence, by_score)
    scores = finite(scores, evidence).float()
    fixed = evidence.fixed()
    if evidence.valid is not None:
        scores = scores.masked_fill(~evidence.valid, float("-inf"))
    if fixed is not None:
        scores = scores.masked_fill(fixed, float("inf"))
    total = k + (evidence.n - evidence.free())
    keep = descending(scores)[:, :total]
    if not by_score:
        return keep.sort(dim=-1).values
    return keep


def _select_on_host(scores: Any, k: int, evidence: BaseEvidence, by_score: bool) -> Tensor:
    """:func:`select` in numpy, for (B,N) float32."""
    refuse_nan(scores, evidence)
    rank = -scores
    if evidence.valid is not None:
        rank[~values(evidence.valid)] = np.inf
    if evidence.masked:
        fixed = evidence.fixed()
        if fixed is not None:
            rank[values(fixed)] = -np.inf
    elif evidence.prefix:
        rank[:, : evidence.prefix] = -np.inf
    keep = np.argsort(rank, axis=1, kind="stable")[:, : k + (evidence.n - evidence.free())]
    return torch.from_numpy(np.ascontiguousarray(keep) if by_score else np.sort(keep, axis=1))


def question(evidence: VisualEvidence) -> tuple[Tensor, Tensor] | None:
    """The words of the question in the language model's space: (B,M,D) float32 of unit length, zero where a sample has
    fewer, and (B,M) which are there. None where the evidence has no text.

    Raises ``ValueError`` when they are no vectors of the space of the visual embeddings.
    """
    text, seen = evidence.text, evidence.projected
    if text is None:
        return None
    text = text.detach()
    text = text.unsqueeze(1) if text.dim() == 2 else text
    if text.dim() != 3 or text.shape[0] != seen.shape[0] or text.shape[2] != seen.shape[2]:
        raise ValueError(
            f"text is (batch, words, channels) in the space of the visual embeddings {tuple(seen.shape)}, not "
            f"{tuple(text.shape)}"
        )
    valid = evidence.text_valid
    valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if valid is None else valid.bool()
    return unit(text).masked_fill(~valid.unsqueeze(-1), 0.0), valid


def relevance(evidence: VisualEvidence) -> Tensor:
    """(B,N) mean cosine between the tokens behind the prefix and the words of the question, in the language model's
    space; 0 for samples without a word."""
    words = question(evidence)
    seen = unit(evidence.projected.detach())
    if words is None:
        return torch.zeros_like(seen[..., 0])
    mean = words[0].sum(1, keepdim=True) / words[1].sum(1).clamp(min=1)[:, None, None]
    return inner(seen, mean).squeeze(-1)
