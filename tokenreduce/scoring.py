"""Scores that several methods share. Everything is computed in float32, per sample, without a batch-wide decision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tokenreduce.evidence import Evidence
from tokenreduce.readable import readable, to_onnx

__all__ = [
    "ascending", "clean", "cls_attention", "cls_logits", "descending", "distances", "excluded", "finite", "gram",
    "highest", "importance", "inner", "key_metric", "question", "received_attention", "received_by_head", "relevance",
    "select", "single_head", "unit",
]  # fmt: skip

#: Rows from which half of a Gram matrix is worth the copies that spare the other half.
_GRAM = 256


def inner(a: Tensor, b: Tensor) -> Tensor:
    """(B,M,N) inner products of (B,M,d) and (B,N,d) in float32, also under autocast: a rounded ranking is another."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().transpose(1, 2)


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
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


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


def finite(scores: Tensor, evidence: Evidence) -> Tensor:
    """``scores`` itself; raises ``ValueError`` when they hold NaN.

    Checked in eager mode on the CPU, where it costs nothing. Elsewhere (a check would stall the GPU, break a compiled
    graph, or ask ``vmap`` for a value) NaN is replaced by the lowest score: no decision is made on it and the model's
    output stays NaN.
    """
    if _checked(scores):
        if bool(scores.isnan().any()):
            raise ValueError(
                f"NaN in the tokens at layer {evidence.layer}: the input or the weights hold NaN or overflow; "
                "check the preprocessing, or run in float32 or bfloat16"
            )
        return scores
    return torch.where(scores.isnan(), float("-inf"), scores)


def _checked(values: Tensor) -> bool:
    return values.device.type == "cpu" and readable(values)


def clean(x: Tensor, evidence: Evidence) -> Tensor:
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


def key_metric(evidence: Evidence) -> Tensor:
    """(B,N,d) keys averaged over heads: the similarity metric of ToMe and its successors."""
    return evidence.keys.mean(1)


def cls_attention(evidence: Evidence) -> Tensor:
    """(B,N) attention that the class token pays to every token, averaged over heads."""
    return evidence.attention("cls")[:, :, 0].mean(1)


def single_head(evidence: Evidence) -> Evidence:
    """The same evidence with all heads side by side as one of full width C: its rows are softmax(q·k / sqrt(C)).

    That is not the mean over heads. Rows that were given stay as they are.
    """
    if evidence._attention is not None:
        return evidence
    q, k = (evidence.queries, evidence.keys) if evidence._rotated is None else evidence._rotated
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = copy.copy(evidence)
    out._queries, out._keys = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (q, k))
    out._rotated, out._map, out._scale = None, None, None
    return out


def cls_logits(evidence: Evidence) -> Tensor:
    """(B,N) logits of the class token's attention row before softmax, averaged over heads.

    Where softmax rows were given these are their logarithms: the logits less a constant, in the same order.
    """
    if evidence._attention is not None:
        rows = evidence.attention("cls")[:, :, 0]
        return rows.clamp(min=torch.finfo(rows.dtype).tiny).log().mean(1)
    if not evidence.cls:
        raise ValueError("the model has no class token to take attention from")
    heads, d = evidence.queries.shape[1], evidence.queries.shape[-1]
    scale = d**-0.5 if evidence._scale is None else evidence._scale
    joined = single_head(evidence)  # the sum over heads is one product of full width
    return inner(joined.queries[:, 0, :1], joined.keys[:, 0])[:, 0] * (scale / heads)


def received_by_head(evidence: Evidence, chunk: int = 128) -> Tensor:
    """(B,H,N) attention that every token receives in each head, averaged over queries.

    Rows are computed ``chunk`` at a time, so that no N x N map is ever held. Queries that are not there do not vote.
    """
    if evidence._attention is not None:
        return evidence.attention("all").mean(2)
    n, device = evidence.n, evidence.x.device
    total: Tensor | None = None
    for start in range(0, n, chunk):
        rows = _rows(evidence, start, min(start + chunk, n))
        if rows is None:
            rows = evidence.attention(torch.arange(start, min(start + chunk, n), device=device))
        if evidence.valid is not None:
            rows = rows * evidence.valid[:, None, start : start + chunk, None]
        total = rows.sum(2) if total is None else total + rows.sum(2)
    assert total is not None
    return total / (n if evidence.valid is None else evidence.valid.sum(1)[:, None, None])


def _rows(evidence: Evidence, start: int, end: int) -> Tensor | None:
    """``evidence.attention`` of rows that stand side by side, which need not be gathered; None where queries do not
    see all keys."""
    if evidence.mask is not None or evidence.causal or evidence._softcap is not None:
        return None
    q, k = (evidence.queries, evidence.keys) if evidence._rotated is None else evidence._rotated
    if k.shape[1] != q.shape[1]:
        return None
    scale = q.shape[-1] ** -0.5 if evidence._scale is None else evidence._scale
    with torch.autocast(q.device.type, enabled=False):
        logits = (q[:, :, start:end].float() * scale) @ k.float().transpose(-2, -1)
    bias = evidence.key_bias()
    return (logits if bias is None else logits + bias).softmax(-1)


def received_attention(evidence: Evidence, chunk: int = 128) -> Tensor:
    """(B,N) attention that every token receives, averaged over heads and queries; see :func:`received_by_head`."""
    return received_by_head(evidence, chunk).mean(1)


def importance(evidence: Evidence) -> Tensor:
    """(B,N) attention from the class token, or, in a model without one, the mean attention received."""
    return cls_attention(evidence) if evidence.cls else received_attention(evidence)


def excluded(evidence: Evidence) -> Tensor | None:
    """(B, N-prefix) bool of the tokens behind the prefix that take no part: protected by a mask, or not there.

    None in the usual case that protection is a count and every token is real.
    """
    p = evidence.prefix
    masked = isinstance(evidence._protected, Tensor) or evidence.visual is not None
    out = evidence.fixed() if masked else None
    if evidence.valid is not None:
        out = ~evidence.valid if out is None else out | ~evidence.valid
    return None if out is None else out[:, p:]


def select(scores: Tensor, k: int, evidence: Evidence, *, by_score: bool = False) -> Tensor:
    """(B, prefix+k) indices: protected tokens first, then the ``k`` best others in position or score order.

    Tokens that are not there (``evidence.valid``) come last. ``scores`` is (B,N); higher stays.
    """
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


def question(evidence: Evidence) -> tuple[Tensor, Tensor] | None:
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


def relevance(evidence: Evidence) -> Tensor:
    """(B,N) mean cosine between the tokens behind the prefix and the words of the question, in the language model's
    space; 0 for samples without a word."""
    words = question(evidence)
    seen = unit(evidence.projected.detach())
    if words is None:
        return torch.zeros_like(seen[..., 0])
    mean = words[0].sum(1, keepdim=True) / words[1].sum(1).clamp(min=1)[:, None, None]
    return inner(seen, mean).squeeze(-1)
