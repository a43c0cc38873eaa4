"""The lazy greedy choice takes what the plain one takes, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenreduce import greedy
from tokenreduce.greedy import cover


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
    seen, stock = [], torch.Tensor.index_select

    def index_select(self, dim, index):
        seen.append(len(index))
        return stock(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", index_select)
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
