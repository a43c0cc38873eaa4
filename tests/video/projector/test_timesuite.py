"""Token shuffle of TimeSuite against its layer at the first training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.core.registry import get_class

TokenShuffle = get_class("token-shuffle")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m"), [(16, 4), (24, 4), (9, 3), (6, 2)])
def test_is_the_shuffle_layer_as_it_is_initialised(n, m):
    """Groups of m are joined along the channels; the layer is the projector's weight m times, divided by m."""
    torch.manual_seed(0)
    projector = nn.Linear(5, 7)
    layer = nn.Linear(5 * m, 7)
    with torch.no_grad():
        layer.weight.copy_(projector.weight.repeat(1, m) / m)
        layer.bias.copy_(projector.bias)
    x = noise(2, n, 5)
    plan = TokenShuffle(m=m).plan(tr.Evidence(x))
    with torch.no_grad():
        torch.testing.assert_close(projector(plan.reduce(x)), layer(x.reshape(2, n // m, 5 * m)))
    assert plan.keep[1].tolist() == list(range(0, n, m))
    assert TokenShuffle.space == "vision", "before the projector"


@pytest.mark.parametrize("n", [1, 2, 5, 7, 24, 33])
@pytest.mark.parametrize("keep", [1, 2, 3, 0.25, 0.6, 0.95])
def test_any_number_of_groups_in_order(n, keep):
    x = noise(1, n, 4)
    method = TokenShuffle(keep=keep)
    plan = method.plan(tr.Evidence(x))
    k = method.total(n)
    if k == n:
        assert plan.is_identity
        return
    group = [j * k // n for j in range(n)]
    assert plan.sources()[0].tolist() == group
    lengths = [group.count(g) for g in range(k)]
    assert max(lengths) - min(lengths) <= 1
    for g in range(k):
        torch.testing.assert_close(plan.reduce(x)[0, g], x[0, [j for j in range(n) if group[j] == g]].mean(0))


def test_sizes_do_not_weigh_but_are_summed():
    x, size = noise(1, 4, 3), torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    plan = TokenShuffle(keep=2).plan(tr.Evidence(x, size=size))
    torch.testing.assert_close(plan.reduce(x, size)[0, 0], x[0, :2].mean(0))
    assert plan.reduce_size(size).tolist() == [[4.0, 2.0]]


def test_prefix_stays_and_visual_evidence_is_taken():
    x = noise(1, 9, 3)
    plan = TokenShuffle().plan(tr.Evidence(x, protected=1))
    assert plan.sources()[0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    e = visual(ORIGINS["frames"]).in_vision(False)
    assert TokenShuffle().plan(e).k == 12


def test_settings():
    assert TokenShuffle() == TokenShuffle(keep=0.25)
    assert TokenShuffle(m=8).keep == 0.125
    method = tr.get_method("token-shuffle:m=3")
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="m is an int >= 1"):
            TokenShuffle(m=bad)
