"""Numbers of small tensors on the host, where numpy starts an operation several times faster than torch.

Which token goes where is a few hundred integers beside features of megabytes. On the CPU the integers and sizes of a
plan are worked out in numpy, without a copy, and features stay with torch. Everywhere else (a GPU, a graph that is
traced, ``vmap``, tensors of other classes) torch does the same in as many operators as it takes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Groups", "best_among", "counted_rows", "marked", "most_alike", "not_a_number", "on_host", "values"]

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_TINY = np.finfo(np.float32).tiny


def on_host(*tensors: Tensor | None) -> bool:
    """Whether numpy may work on all of these: plain tensors on the CPU whose numbers Python may ask for."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and not (type(t) is Tensor and t.is_cpu):
            return False
    # Not inside transforms of torch.func, nor where a tracer records operators.
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._get_dispatch_mode(_PROXY) is None


def values(t: Tensor) -> Any:
    """The numbers of ``t`` as an array that shares its memory; not to be written to."""
    return (t.detach() if t.requires_grad else t).numpy()


def not_a_number(scores: Any) -> bool:
    """Whether an array of floats holds NaN."""
    return bool(np.isnan(scores).any())


def most_alike(scores: Any) -> tuple[Any, Any]:
    """(B,E) the highest of every row of an array (B,E,O), and which it is: the first of several, or the first NaN."""
    which = scores.argmax(-1)
    rows = scores.reshape(-1, scores.shape[2])
    best = rows[np.arange(len(rows)), which.ravel()]
    return best.reshape(which.shape), which


def best_among(scores: Any, among: Any, wanted: Any) -> Any:
    """(B,N) bool: the ``wanted`` (B,1) with the highest scores (B,N) float32 ``among`` those marked, or all of them
    where there are fewer; ties go to the lower index. None where what decides is not a number.

    One sort of values finds the lowest that stays; places need no sorting."""
    ranked = np.where(among, scores, -np.inf)
    if not_a_number(ranked):
        return None
    wanted = np.minimum(wanted, among.sum(1, keepdims=True))
    n, ordered = ranked.shape[1], np.sort(ranked, axis=1)
    least = ordered[counted_rows(len(ranked)), np.minimum(n - wanted, n - 1)]
    above, level = ranked > least, (ranked == least) & among
    missing = wanted - above.sum(1, keepdims=True)
    if (level.sum(1, keepdims=True) == missing).all():
        return above | level
    return above | (level & (level.cumsum(1) <= missing))


def marked(stay: Any, k: int) -> Any:
    """(B,k) the places of True in an array (B,N) of bools that has ``k`` in every row, ascending."""
    batch, n = stay.shape
    return np.flatnonzero(stay).reshape(batch, k) - counted_rows(batch, n)


@lru_cache(maxsize=512)
def counted_rows(batch: int, step: int = 1) -> Any:
    """(batch,1) the numbers 0, ``step``, ...: first rows of samples that lie one behind the other; read-only."""
    made = np.arange(batch)[:, None] * step
    made.setflags(write=False)
    return made


def _flat(rows: Any, n: int) -> Any:
    """(B*K,) the ``rows`` (B,K) of n each, counted through all samples."""
    return (rows + counted_rows(len(rows), n)).ravel()


class Groups(NamedTuple):
    """Rows of a merge counted through all samples: ``keep`` (B*K,), ``src`` (B*R,), and ``dst`` (B*R,), the outputs
    that these join."""

    keep: Any
    src: Any
    dst: Any

    @classmethod
    def of(cls, n: int, keep: Any, src: Any, dst: Any) -> Groups:
        """From a plan's indices (B,K), (B,R), (B,R) on ``n`` tokens."""
        if len(keep) == 1:
            return cls(keep[0], src[0], dst[0])
        return cls(_flat(keep, n), _flat(src, n), _flat(dst, keep.shape[1]))

    def summed(self, w: Any, scale: Any = None) -> tuple[Any, Any]:
        """(B*R,) what sources bring and (B*K,) what the members of an output have together, of ``w`` (B,N) or of one
        each; ``scale`` (B,R) damps what sources bring."""
        if w is None:
            brought, total = np.ones(len(self.src), np.float32), np.ones(len(self.keep), np.float32)
        else:
            w = w.ravel()
            brought, total = w[self.src], w[self.keep]
        if scale is not None:
            brought = brought * scale.ravel()
        np.add.at(total, self.dst, brought)
        return brought, total

    def mean(self, x: Tensor, brought: Any, total: Any) -> Tensor:
        """(B*K,C) weighted means of ``x`` (B,N,C) as a correction of the kept rows: those that nothing joins stay
        exact, and only B*R rows are computed."""
        share = torch.from_numpy((brought / np.maximum(total[self.dst], _TINY))[:, None])
        rows, to = x.flatten(0, 1), torch.from_numpy(self.dst)
        out = rows.index_select(0, torch.from_numpy(self.keep))
        change = rows.index_select(0, torch.from_numpy(self.src))
        change.sub_(out.index_select(0, to)).mul_(share if x.dtype == share.dtype else share.to(x.dtype))
        return out.index_add_(0, to, change)

    def largest(self, each: Any) -> Any:
        """(B*K,) the largest of ``each`` (B,N) among the members of an output."""
        flat = each.ravel()
        out = flat[self.keep]
        np.maximum.at(out, self.dst, flat[self.src])
        return out
