"""Soft slimming against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

import tokenreduce as tr


@pytest.mark.parametrize(("n", "prefix", "keep"), [(9, 1, 3), (12, 0, 5), (7, 2, 1)])
def test_outputs_are_softmax_means_of_all_tokens(n, prefix, keep):
    g = torch.Generator().manual_seed(n)
    x, keys = torch.randn(2, n, 4, generator=g), torch.randn(2, 3, n, 5, generator=g)
    plan = tr.get_method(f"soft-slim:keep={keep},temperature=0.2").plan(tr.Evidence(x, keys=keys, protected=prefix))
    free = n - prefix
    seeds = [prefix + int((i + 0.5) * free / keep) for i in range(keep)]
    assert plan.keep.tolist() == [[*range(prefix), *seeds]] * 2
    for b in range(2):
        metric = [keys[b, :, i].mean(0) for i in range(n)]
        for k, seed in enumerate(seeds):
            cosine = [
                float(metric[seed] @ metric[i] / metric[seed].norm() / metric[i].norm()) for i in range(prefix, n)
            ]
            weights = [math.exp(c / 0.2) for c in cosine]
            want = sum(w * x[b, prefix + i] for i, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(plan.reduce(x)[b, prefix + k], want)
    assert torch.equal(plan.reduce(x)[:, :prefix], x[:, :prefix])


def test_cold_softmax_leaves_the_seeds_and_equal_tokens_share():
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 3]])[None]
    plan = tr.get_method("soft-slim:keep=2,temperature=0.001").plan(tr.Evidence(x, keys=x[:, None]))
    assert plan.keep.tolist() == [[1, 3]]
    torch.testing.assert_close(plan.reduce(x)[0], torch.tensor([[0.0, 2.0], [0.0, 2.0]]))


def test_bad_settings():
    with pytest.raises(ValueError, match="temperature"):
        tr.get_method("soft-slim:temperature=0")
    with pytest.raises(ValueError, match="layer"):
        tr.get_method("soft-slim:layer=7").acts_at(0, 6)
