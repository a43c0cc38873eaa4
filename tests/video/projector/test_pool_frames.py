"""Average pooling over frames against torch's pooling, and budgets that are no whole number of frames."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool3d

import tokenreduce as tr
from tokenreduce.algorithms.baseline import windows
from tokenreduce.core.registry import get_class

PoolFrames = get_class("pool-frames")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("t", "k"), [(4, 2), (6, 3), (8, 4), (8, 8), (3, 3)])
def test_is_pooling_over_time_where_it_divides(t, k):
    x = noise(2, t * 15, 4)
    got = PoolFrames(frames=k).plan(tr.Evidence(x, grid=(t, 3, 5))).reduce(x)
    want = avg_pool3d(x.view(2, t, 3, 5, 4).permute(0, 4, 1, 2, 3), (k, 1, 1)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("keep", [1, 4, 13, 15, 16, 31, 0.5, 0.9])
def test_budgets_are_exact_and_bands_are_as_few_as_have_room(t, keep):
    n, x = 15, noise(1, t * 15, 4)
    method = PoolFrames(keep=keep)
    k = method.total(t * n)
    plan = method.plan(tr.Evidence(x, grid=(t, 3, 5)))
    if k == t * n:
        assert plan.is_identity
        return
    source = plan.sources()[0]
    assert sorted(set(source.tolist())) == list(range(k))
    bands = -(-k // n)
    band_of = [next(i for i in range(bands) if (i + 1) * t // bands > f) for f in range(t)]
    for group in range(k):
        at = (source == group).nonzero().flatten()
        assert len({band_of[f] for f in (at // n).tolist()}) == 1, "no output is from two bands"
        band = band_of[int(at[0]) // n]
        assert set((at // n).tolist()) == {f for f in range(t) if band_of[f] == band}, "and from all of its frames"
        torch.testing.assert_close(plan.reduce(x)[0, group], x[0, at].mean(0))
        if k % n == 0:
            assert len(set((at % n).tolist())) == 1, "places stay apart"
    first = [source.tolist().index(g) for g in range(k)]
    assert plan.keep[0].tolist() == first == sorted(first)


def test_an_odd_budget_pools_few_neighbours():
    """40 of 5 frames of 16: three bands of 14, 13 and 13, of 1, 2 and 2 frames."""
    e = tr.Evidence(noise(1, 80, 2), grid=(5, 4, 4))
    plan = PoolFrames(keep=0.5).plan(e)
    frame_of = plan.keep[0] // 16
    assert [int((frame_of == f).sum()) for f in range(5)] == [14, 13, 0, 13, 0]


def test_windows_of_one_band_are_the_cells_of_pool():
    e = tr.Evidence(noise(1, 48, 2), grid=(3, 4, 4))
    one = tr.get_method("pool:keep=4").plan(tr.Evidence(e.x[:, :16], grid=(4, 4)))
    assert windows(e, 4, 1).view(3, 16).tolist() == [one.sources()[0].tolist()] * 3


@pytest.mark.parametrize(("k", "bands"), [(9, 0), (9, 4), (49, 3), (2, 3), (17, 1)])
def test_windows_refuse_what_has_no_room(k, bands):
    with pytest.raises(ValueError, match="cannot be cut"):
        windows(tr.Evidence(noise(1, 48, 2), grid=(3, 4, 4)), k, bands)


def test_settings():
    assert PoolFrames() == PoolFrames(keep=0.5)
    method = tr.get_method("pool-frames:frames=3")
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    with pytest.raises(ValueError, match="frames is an int >= 1"):
        PoolFrames(frames=0)
    front = PoolFrames(keep=2).plan(tr.Evidence(noise(1, 9, 2), protected=1, grid=(2, 2, 2)))
    assert front.sources()[0].tolist() == [0, 1, 1, 2, 2, 1, 1, 2, 2]
