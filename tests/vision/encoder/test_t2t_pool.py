"""T2T's windows against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

import tokenreduce as tr


def loop(x, rows, cols, kernel, stride, padding):
    """Means of the windows of ``x`` (rows*cols,C) whose first row and column are -padding + i*stride, while tokens are
    left over."""

    def starts(n):
        out = [-padding]
        while out[-1] + kernel < n and (out[-1] + stride + kernel <= n + padding or out[-1] + kernel < n):
            out.append(out[-1] + stride)
        while out[-1] + stride + kernel <= n + padding:
            out.append(out[-1] + stride)
        return out

    means = []
    for top in starts(rows):
        for left in starts(cols):
            inside = [
                r * cols + c
                for r in range(max(top, 0), min(top + kernel, rows))
                for c in range(max(left, 0), min(left + kernel, cols))
            ]
            means.append(x[inside].mean(0))
    return torch.stack(means)


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 3, 1), (4, 2, 1), (5, 3, 2)])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (1, 4), (3, 2)])
def test_outputs_are_means_of_windows(grid, window):
    rows, cols = grid
    x = torch.randn(2, 2 + rows * cols, 3, generator=torch.Generator().manual_seed(0))
    method = tr.get_method("t2t-pool:kernel={},stride={},padding={}".format(*window))
    plan = method.plan(tr.Evidence(x, protected=2, grid=grid))
    want = torch.stack([torch.cat([one[:2], loop(one[2:], rows, cols, *window)]) for one in x])
    torch.testing.assert_close(plan.reduce(x), want)
    if window == (3, 2, 1):
        assert plan.k == 2 + math.ceil(rows / 2) * math.ceil(cols / 2)


def test_outputs_stand_in_the_middle_and_every_token_feeds_one():
    plan = tr.get_method("t2t-pool").plan(tr.Evidence(torch.randn(1, 16, 2), grid=(4, 4)))
    assert plan.keep.tolist() == [[0, 2, 8, 10]]
    assert bool((plan.weights.sum(1) > 0).all())
    assert plan.weights[0, 3].view(4, 4).tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_keep_widens_the_cells_of_average_pooling():
    """Where the cells are 2x2 these are the published windows."""
    x = torch.randn(1, 36, 2)
    published, mine = (tr.get_method(f"t2t-pool{more}").plan(tr.Evidence(x, grid=(6, 6))) for more in ("", ":keep=9"))
    assert torch.equal(published.weights, mine.weights)


@pytest.mark.parametrize("bad", ["kernel=0", "stride=4", "padding=2", "layer=-1"])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"kernel|stride|padding|layer"):
        tr.get_method(f"t2t-pool:{bad}")
