"""Greedy choices: what runs on the CPU takes what the plain definition takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenreduce.algorithms import greedy
from tokenreduce.algorithms.greedy import cover, farthest, volume


def by_card(worth, keep, weight=None, combination="product", least=0.0):
    """The definition for one sample, candidate by candidate, in float64."""
    n, chosen, covered = len(worth), [], torch.zeros(worth.shape[1], dtype=torch.float64)
    for _ in range(keep):
        scores = []
        for j in range(n):
            gain = float((worth[j].double() - covered).clamp(min=0).sum())
            gain = gain if gain > least else 0.0
            w = 1.0 if weight is None else float(weight[j])
            score = gain if weight is None else gain * w if combination == "product" else gain + w
            scores.append(float("-inf") if j in chosen else score)
        chosen.append(scores.index(max(scores)))
        covered = torch.maximum(covered, worth[chosen[-1]].double())
    return chosen


def worths(kind, batch, n, parts, seed):
    g = torch.Generator().manual_seed(seed)
    if kind == "whole":  # small whole numbers: sums are exact and ties many
        return torch.randint(0, 4, (batch, n, parts), generator=g).float()
    if kind == "halves":  # and saturated: two candidates cover all
        return torch.randint(0, 2, (batch, n, parts), generator=g).float()
    x = torch.randn(batch, n, 6, generator=g)
    if kind == "duplicated":
        x = x[:, torch.randint(0, max(1, n // 4), (n,), generator=g)] * (1 + torch.rand(batch, n, 1, generator=g))
    x = torch.nn.functional.normalize(x, dim=-1)
    return (x @ x.transpose(1, 2)).clamp(min=0)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["whole", "halves", "cosines", "duplicated"]),
    batch=st.integers(1, 3),
    n=st.integers(1, 90),
    parts=st.integers(1, 40),
    keep=st.floats(0, 1),
    weighted=st.sampled_from([None, "random", "equal", "ties", "zeros"]),
    combination=st.sampled_from(["product", "sum"]),
    least=st.sampled_from([0.0, 1e-5, 3.0]),
    block=st.sampled_from([1, 2, 16, 64]),
    seed=st.integers(0, 2**20),
)
def test_lazy_is_plain(kind, batch, n, parts, keep, weighted, combination, least, block, seed):
    worth, keep = worths(kind, batch, n, parts, seed), max(1, round(keep * n))
    g = torch.Generator().manual_seed(seed + 1)
    weight = {
        None: None,
        "random": torch.rand(batch, n, generator=g),
        "equal": torch.full((batch, n), 0.3),
        "ties": torch.randint(1, 4, (batch, n), generator=g).float(),
        "zeros": torch.rand(batch, n, generator=g) * torch.randint(0, 2, (batch, n), generator=g),
    }[weighted]
    before, stock = worth.clone(), greedy._BLOCK
    try:
        greedy._BLOCK = block
        lazy = cover(worth, keep, weight, combination=combination, least=least)
    finally:
        greedy._BLOCK = stock
    assert torch.equal(worth, before)
    assert torch.equal(lazy, greedy._plain(worth, keep, weight, combination, least))
    assert all(len(set(row)) == keep for row in lazy.tolist())
    if kind in ("whole", "halves") and weighted in (None, "ties"):
        for b in range(batch):
            own = None if weight is None else weight[b]
            assert lazy[b].tolist() == by_card(worth[b], keep, own, combination, least)


@pytest.mark.parametrize("kind", ["cosines", "duplicated"])
def test_at_the_size_of_an_image(kind):
    worth = worths(kind, 2, 576, 0, 5)
    weight = torch.rand(2, 576, generator=torch.Generator().manual_seed(3)) ** 4
    for own in (None, weight):
        assert torch.equal(cover(worth, 192, own), greedy._plain(worth, 192, own, "product", 0.0))


def test_most_gains_are_left_alone(monkeypatch):
    """576 candidates, 64 steps: far fewer gains than 63 times all are summed again."""
    seen, stock = [], torch.Tensor.relu_

    def relu_(self):
        seen.append(len(self))
        return stock(self)

    monkeypatch.setattr(torch.Tensor, "relu_", relu_)
    cover(worths("cosines", 1, 576, 0, 5), 64)
    assert 63 * greedy._BLOCK <= sum(seen) < 63 * 576 / 4


def test_a_tie_with_a_candidate_that_was_not_looked_at_goes_to_the_lower_index(monkeypatch):
    """All gain 1 in every step: the block holds any of them, the choice is the first."""
    monkeypatch.setattr(greedy, "_BLOCK", 1)
    assert cover(torch.eye(40)[None], 40).tolist() == [list(range(40))]


def test_what_adds_nothing_comes_last_in_order():
    worth = torch.tensor([[[0.0, 0], [1, 0], [1, 0], [0, 3]]])
    assert cover(worth, 4).tolist() == [[3, 1, 0, 2]]
    assert cover(worth, 4, torch.tensor([[5.0, 1, 1, 0.5]]), combination="sum").tolist() == [[0, 3, 1, 2]]
    assert cover(worth, 4, least=1.0).tolist() == [[3, 0, 1, 2]]
    assert cover(worth, 0).shape == (1, 0)
    assert cover(worth[:0], 2).shape == (0, 2)


def test_gradients_are_not_followed():
    worth, weight = torch.rand(1, 6, 6), torch.rand(1, 6)
    want = cover(worth, 3, weight)
    assert torch.equal(cover(worth.requires_grad_(), 3, weight.requires_grad_()), want)


def test_in_a_compiled_graph():
    worth = worths("cosines", 2, 20, 0, 1)
    compiled = torch.compile(lambda w: cover(w, 5), backend="eager", fullgraph=True)
    assert torch.equal(compiled(worth), cover(worth, 5))


def far_by_definition(d, keep):
    n = len(d)
    chosen = [max(range(n), key=lambda j: (min((float(d[i, j]) for i in range(n) if i != j), default=math.inf), -j))]
    while len(chosen) < keep:
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (min(float(d[i, j]) for i in chosen), -j)))
    return chosen


@pytest.mark.parametrize("kind", ["whole", "halves", "cosines", "duplicated"])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 2), (2, 23)])
def test_farthest_is_the_max_min_choice(kind, batch, n):
    d = worths(kind, batch, n, n, seed=n)
    for keep in range(n + 1):
        chosen = farthest(d, keep)
        assert chosen.shape == (batch, keep)
        assert chosen.tolist() == [far_by_definition(row, keep)[:keep] for row in d]
        if keep:
            assert torch.equal(chosen, greedy._spread(d, keep, chosen[:, 0]))


def process(batch, n, width, seed, copies=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(batch, n, width, generator=g), dim=-1).repeat(1, copies, 1)
    q = torch.rand(batch, n * copies, generator=g) + 0.1
    return x @ x.transpose(1, 2) * q.unsqueeze(1) * q.unsqueeze(2), q


@pytest.mark.parametrize("keep", [0, 1, 4, 12])
def test_volume_makes_the_determinant_largest(keep):
    kernel, q = process(3, 12, 20, seed=keep)
    got = volume(kernel, q * q, q, keep)
    for b in range(3):
        chosen = []
        for _ in range(keep):
            left = [j for j in range(12) if j not in chosen]
            parts = [kernel[b].double()[[*chosen, j]][:, [*chosen, j]] for j in left]
            chosen.append(left[max(range(len(left)), key=lambda i: (float(torch.linalg.det(parts[i])), -i))])
        assert got[b].tolist() == chosen


@pytest.mark.parametrize(("n", "width", "copies", "keep"), [(20, 6, 1, 15), (6, 8, 4, 20), (200, 64, 1, 90)])
def test_volume_of_one_sample_is_that_of_a_batch(n, width, copies, keep):
    """Beyond the rank, among duplicates, and at the size of an image."""
    kernel, q = process(2, n, width, 5, copies)
    before = kernel.clone()
    got = volume(kernel, q * q, q, keep)
    assert torch.equal(kernel, before)
    assert torch.equal(got, greedy._volume(kernel, q * q, q, keep))
    assert all(len(set(row)) == keep for row in got.tolist())
    if n * copies > keep > width:  # what the others span comes last, by descending quality
        rest = [q[0, j] for j in got[0, min(n, width) :].tolist()]
        assert rest == sorted(rest, reverse=True)


def test_volume_of_empty_candidates():
    kernel = torch.zeros(1, 4, 4)
    kernel[0, 2, 2] = 1.0
    q = torch.tensor([[1.0, 2, 3, 2]])
    assert volume(kernel, kernel.diagonal(dim1=1, dim2=2), q, 4).tolist() == [[2, 1, 3, 0]]
