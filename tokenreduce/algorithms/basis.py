"""Tokens that a small basis of others cannot express, as ApET (arXiv 2602.19870) keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import descending, inner, unit
from tokenreduce.core.budget import check_count

__all__ = ["BASIS", "approximated", "check_basis", "farthest_first", "residuals"]

#: What becomes of the basis tokens: their vectors go to slots of others, or they stay at their own places.
BASIS = ("slots", "kept")


def check_basis(basis: str | None, tokens: int, ridge: float, start: int | None, seed: int) -> None:
    """Raise ``ValueError`` for settings that are none."""
    if basis is not None and basis not in BASIS:
        raise ValueError(f"basis is one of {BASIS} or None, not {basis!r}")
    check_count(tokens, "basis_token_num", 1)
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < float("inf"):
        raise ValueError(f"ridge is a finite number > 0, not {ridge!r}")
    if start is not None:
        check_count(start, "start")
    check_count(seed, "seed")


def farthest_first(x: Tensor, count: int, start: int) -> Tensor:
    """(count,) rows of ``x`` (N,C) by Euclidean distance, in order: ``start``, then always the one farthest from the
    nearest of those before; ties to the lower index, nothing twice."""
    chosen = [start]
    far = torch.full_like(x[:, 0], float("inf"))
    for _ in range(count - 1):
        far = torch.minimum(far, (x - x[chosen[-1]]).norm(dim=1))
        far[chosen] = -1.0
        chosen.append(int(far.argmax()))
    return torch.tensor(chosen[:count], dtype=torch.long, device=x.device)


def residuals(x: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """(N,) length of what the ridge projection of ``x`` (N,C) on the rows of ``basis`` (b,C) leaves over; the small
    system is solved in float64, since equal rows make it singular up to ``ridge``."""
    wide = basis.double()
    system = wide @ wide.T + ridge * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    weights = torch.linalg.solve(system, inner(basis[None], x[None])[0].double()).T
    return (x - inner(weights[None], basis.T[None])[0]).norm(dim=1)


def approximated(
    x: Tensor, keep: int, tokens: int, ridge: float, start: int, kept: bool, by_place: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``keep`` < N tokens of ``x`` (N,C) float32, ascending, and what joins them, see
    :func:`tokenreduce.algorithms.sequence.keep_mixed`.

    Of the tokens with the largest residual the first ones are carriers, which every token that goes joins by cosine
    (plain mean). The others become slots for the ``tokens`` basis vectors, in the order in which these were chosen:
    the slots by their places (``by_place``), or by falling residual. With ``kept`` the basis tokens stay at their own
    places instead, beside as many others as ``keep`` allows. A basis takes half of ``keep`` at most.
    """
    count = tokens if keep > tokens else keep // 2
    basis = farthest_first(x, count, start)
    error = residuals(x, x[basis], ridge) if count else x.norm(dim=1)
    if kept:
        ranked = descending(error.index_fill(0, basis, -1.0)[None])[0]
        carriers, slots = ranked[: keep - count], basis
    else:
        ranked = descending(error[None])[0]
        carriers, slots = ranked[: keep - count], ranked[keep - count : keep]
        slots = slots.sort().values if by_place else slots
    stay = torch.cat([carriers, slots]).sort().values
    carriers = carriers.sort().values
    gone = torch.ones_like(x[:, 0], dtype=torch.bool).index_fill(0, stay, False).nonzero().flatten()
    u = unit(x)
    into = carriers[inner(u[gone][None], u[carriers][None])[0].argmax(1)]
    own = 1 / (1 + torch.bincount(into, minlength=len(x)).float())
    weight = own[into]
    if not kept:
        own = own.index_fill(0, slots, 0.0)
        gone, into = torch.cat([gone, basis]), torch.cat([into, slots])
        weight = torch.cat([weight, torch.ones_like(slots, dtype=weight.dtype)])
    return stay, (gone, into, weight, own)
