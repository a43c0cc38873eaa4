"""Frame differences against a plain loop over places and frames."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.algorithms.pixels import SLACK


def loop(video, tolerance, anchored):
    """(T,n) bool of what stays of ``video`` (T,n,P)."""
    limit = tolerance + SLACK if tolerance else 0.0
    stay = torch.ones(video.shape[:2], dtype=torch.bool)
    last = list(video[0])
    for t in range(1, len(video)):
        gaps = [float((video[t, i] - last[i]).abs().max()) for i in range(video.shape[1])]
        most = gaps.index(max(gaps))
        for i, gap in enumerate(gaps):
            stay[t, i] = gap > limit or i == most
            if stay[t, i] or not anchored:
                last[i] = video[t, i]
    return stay


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_what_stays_is_what_changed(tolerance, anchored):
    reducer = tr.get_method(f"pixel-diff:tolerance={tolerance},anchored={str(anchored).lower()}")
    for seed, (t, rows, cols) in enumerate([(1, 3, 3), (2, 1, 5), (5, 3, 3), (7, 2, 4)]):
        x = torch.randint(0, 5, (2, t, rows * cols, 2), generator=torch.Generator().manual_seed(seed)).float()
        x[:, :, ::2] = x[:, :1, ::2]
        want = torch.stack([loop(video, tolerance, anchored) for video in x]).flatten(1)
        plan = reducer.plan(tr.Evidence(x.flatten(1, 2), grid=(t, rows, cols)))
        assert torch.equal(plan.places(), want)


def test_slow_changes_add_up():
    x = torch.tensor([[0.0, 0], [1, 9], [2, 0], [3, 9], [4, 0]]).view(1, 10, 1)
    stay = tr.get_method("pixel-diff:tolerance=2").plan(tr.Evidence(x, grid=(5, 1, 2))).places().view(5, 2)
    assert stay[:, 0].tolist() == [True, False, False, True, False]
    raw = tr.get_method("pixel-diff:tolerance=2,anchored=false").plan(tr.Evidence(x, grid=(5, 1, 2))).places()
    assert raw.view(5, 2)[:, 0].tolist() == [True, False, False, False, False]


def test_a_still_video_keeps_its_first_frame_and_one_unit_of_the_others():
    still = torch.full((1, 2 + 3 * 4, 2), 5.0)
    plan = tr.get_method("pixel-diff").plan(tr.Evidence(still, protected=2, grid=(3, 2, 2)))
    assert plan.keep.tolist() == [[0, 1, 2, 3, 4, 5, 6, 10]]


def test_one_frame_and_noise_stay():
    noise = torch.rand(2, 12, 9, generator=torch.Generator().manual_seed(0)) * 255
    for grid in ((3, 4), (1, 3, 4), (3, 2, 2)):
        assert tr.get_method("pixel-diff:tolerance=0.01").plan(tr.Evidence(noise, grid=grid)).is_identity


def test_keep_ranks_by_the_frame_before():
    """Four of the first frame, one of every later one at least, then what changed most; ties to the first."""
    x = torch.tensor([[0.0, 0, 0, 0], [5, 0, 0, 1], [5, 2, 2, 1]]).view(1, 12, 1)
    for keep, want in ((6, [4, 9]), (7, [4, 9, 10]), (8, [4, 7, 9, 10])):
        plan = tr.get_method(f"pixel-diff:keep={keep}").plan(tr.Evidence(x, grid=(3, 2, 2)))
        assert plan.keep.tolist() == [[0, 1, 2, 3, *want]]
    thin = tr.get_method("pixel-diff:keep=3").plan(tr.Evidence(x, grid=(3, 2, 2)))
    assert thin.k == 3
    assert thin.keep[0, 1:].tolist() == [4, 9]
    least = tr.get_method("pixel-diff:keep=1").plan(tr.Evidence(x, grid=(3, 2, 2)))
    assert least.k == 3, "a frame has one unit at least"


def test_bad_input():
    with pytest.raises(ValueError, match="tolerance"):
        tr.get_method("pixel-diff:tolerance=-2")
    x = torch.rand(1, 8, 3)
    x[0, 6, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.get_method("pixel-diff").plan(tr.Evidence(x, grid=(2, 2, 2)))
