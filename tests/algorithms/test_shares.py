from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tokenreduce.algorithms.shares import allot, total_of


def by_hand(weights, total, low, high):
    """Shares in proportion, with bounds, in whole fractions: fix what is out of bounds until nothing is."""
    n = len(weights)
    total = min(max(total, sum(low)), sum(high))
    weights = [Fraction(w) for w in weights] if any(weights) else [Fraction(1)] * n
    # The sum of bounded shares grows with the factor and bends only where a share meets a bound.
    bends = sorted({Fraction(b) / w for w, lo, hi in zip(weights, low, high, strict=True) for b in (lo, hi) if w})

    def shares(factor):
        return [min(max(factor * w, lo), hi) for w, lo, hi in zip(weights, low, high, strict=True)]

    before = Fraction(0)
    for bend in bends:
        if sum(shares(bend)) >= total:
            break
        before = bend
    a, b = sum(shares(before)), sum(shares(bend))
    factor = bend if b == a else before + (bend - before) * (total - a) / (b - a)
    exact = shares(factor)
    out = [int(s) for s in exact]
    order = sorted(range(n), key=lambda i: (-(exact[i] - out[i]), i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return out


@pytest.mark.parametrize("seed", range(30))
def test_against_fractions(seed):
    g = torch.Generator().manual_seed(seed)
    b, n = 3, int(torch.randint(1, 7, (), generator=g))
    weights = torch.randint(1, 9, (b, n), generator=g)
    high = torch.randint(0, 12, (b, n), generator=g)
    low = torch.minimum(torch.randint(0, 3, (b, n), generator=g), high)
    total = torch.randint(0, 40, (b, 1), generator=g)
    got = allot(weights, total, low, high)
    for i in range(b):
        rows = weights[i].tolist(), int(total[i]), low[i].tolist(), high[i].tolist()
        assert got[i].tolist() == by_hand(*rows)


def test_equal_shares_ties_and_zero_weights():
    ones = torch.ones(1, 4, dtype=torch.long)
    assert allot(torch.zeros(1, 4), torch.tensor([[6]]), 0 * ones, 9 * ones).tolist() == [[2, 2, 1, 1]]
    some = allot(torch.tensor([[0.0, 1.0]]), torch.tensor([[5]]), torch.zeros(1, 2).long(), torch.tensor([[9, 3]]))
    assert some.tolist() == [[2, 3]]


def test_totals():
    counts = torch.tensor([[10, 10, 3], [1, 0, 0]])
    assert total_of(4, counts).tolist() == [[11], [1]]
    assert total_of(0.25, counts).tolist() == [[6], [0]]
    assert total_of(1.0, counts).tolist() == [[23], [1]]
    with pytest.raises(ValueError, match="keep"):
        total_of(0, counts)
