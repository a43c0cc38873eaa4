"""PixelPrune against a scan worked out unit by unit."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.algorithms.pixels import SLACK


def apart(a, b, metric):
    gap = [abs(float(p) - float(q)) for p, q in zip(a, b, strict=True)]
    if metric == "max":
        return max(gap)
    return sum(gap) / len(gap) if metric == "mae" else (sum(g * g for g in gap) / len(gap)) ** 0.5


def prediction(now, r, c, alike):
    """Numbers of row and column that predict the unit at ``r``, ``c``."""
    if r == 0 or c == 0:
        return (r, c - 1) if r == 0 else (r - 1, c)
    a, b, corner = now[r][c - 1], now[r - 1][c], now[r - 1][c - 1]
    return (r - 1, c) if alike(corner, a) and not alike(corner, b) else (r, c - 1)


def scan(units, tolerance, metric="max", anchored=True):
    """(rows,cols) bool of what stays of ``units`` (rows,cols,P)."""
    limit = tolerance + SLACK if tolerance else 0.0
    now = [list(row) for row in units]
    stay = torch.ones(units.shape[:2], dtype=torch.bool)
    for r, row in enumerate(units):
        for c, unit in enumerate(row):
            if r == c == 0:
                continue
            pr, pc = prediction(now, r, c, lambda p, q: apart(p, q, metric) <= limit)
            if apart(unit, now[pr][pc], metric) <= limit:
                stay[r, c] = False
                if anchored:
                    now[r][c] = now[pr][pc]
    return stay


def stays(plan):
    return plan.places()


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
@pytest.mark.parametrize("tolerance", [0, 1, 2.5, 4])
def test_what_stays_is_what_a_scan_leaves(tolerance, metric, anchored):
    """Coarse values make ties and distances right on the boundary; batches keep unequal numbers."""
    reducer = tr.get_method(f"pixelprune:tolerance={tolerance},metric={metric},anchored={str(anchored).lower()}")
    for seed, (rows, cols) in enumerate([(1, 7), (6, 1), (5, 5), (4, 9), (7, 6)]):
        x = torch.randint(0, 7, (2, rows, cols, 2), generator=torch.Generator().manual_seed(seed)).float()
        x[1, rows // 2 :] = 3.0
        want = torch.stack([scan(image, tolerance, metric, anchored) for image in x]).flatten(1)
        plan = reducer.plan(tr.Evidence(x.flatten(1, 2), grid=(rows, cols)))
        assert torch.equal(stays(plan), want)


def test_a_worked_example():
    """0 0 9 / 0 9 9 / 5 5 9: an edge that runs downwards is predicted from above, another from the left."""
    x = torch.tensor([0.0, 0, 9, 0, 9, 9, 5, 5, 9]).view(1, 9, 1)
    plan = tr.get_method("pixelprune").plan(tr.Evidence(x, grid=(3, 3)))
    # (0,1) like A; (0,2) no; (1,0) like B; (1,1): C like A, C like B, so A, no; (1,2): C unlike A, so A: gone;
    # (2,0) no; (2,1): C unlike A, so A: gone; (2,2): C (9) unlike A (5), so A: 5, stays.
    assert stays(plan)[0].nonzero().flatten().tolist() == [0, 2, 4, 6, 8]
    assert plan.k == 5


def test_errors_do_not_add_up():
    """A slow ramp: anchored units stay at most the tolerance from what stands for them, raw ones all go."""
    ramp = torch.arange(12.0).view(1, 12, 1)
    anchored, raw = (
        stays(tr.get_method(f"pixelprune:tolerance=2,anchored={a}").plan(tr.Evidence(ramp, grid=(1, 12))))
        for a in ("true", "false")
    )
    assert anchored[0].nonzero().flatten().tolist() == [0, 3, 6, 9]
    assert raw[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("spec", ["pixelprune", "pixelprune:tolerance=4", "pixelprune:tolerance=4,anchored=false"])
def test_uniform_pictures_leave_one_unit_and_noise_leaves_all(spec):
    flat = torch.full((2, 1 + 20, 3), 7.0)
    plan = tr.get_method(spec).plan(tr.Evidence(flat, protected=1, grid=(4, 5)))
    assert plan.keep.tolist() == [[0, 1]] * 2
    noise = torch.rand(2, 20, 300, generator=torch.Generator().manual_seed(0)) * 255
    assert tr.get_method(spec).plan(tr.Evidence(noise, grid=(4, 5))).is_identity


def test_frames_are_images():
    """The first unit of every frame stays, though the one before it is the same."""
    flat = torch.full((1, 3 * 6, 2), 7.0)
    plan = tr.get_method("pixelprune").plan(tr.Evidence(flat, grid=(3, 2, 3)))
    assert plan.keep.tolist() == [[0, 6, 12]]


def test_units_that_are_not_there():
    flat = torch.full((2, 6, 2), 7.0)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 3:] = False
    plan = tr.get_method("pixelprune").plan(tr.Evidence(flat, grid=(2, 3), valid=valid))
    assert stays(plan).sum(1).tolist() == [1, 1]
    noise = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    assert tr.get_method("pixelprune").plan(tr.Evidence(noise, grid=(2, 3), valid=valid)).is_identity


def test_keep_leaves_what_is_furthest_from_its_prediction():
    """Ties go to the first; the first unit always stays."""
    x = torch.tensor([0.0, 3, 3, 10, 10, 12]).view(1, 6, 1)
    for keep, want in ((1, [0]), (2, [0, 3]), (3, [0, 1, 3]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        plan = tr.get_method(f"pixelprune:keep={keep}").plan(tr.Evidence(x, grid=(1, 6)))
        assert plan.keep.tolist() == [want]


@pytest.mark.parametrize(
    "bad", ["tolerance=-1", "tolerance=nan", "metric=l2", "keep=0.5,tolerance=2", "std=0", "std=[0.5,-1]"]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"tolerance|metric|std"):
        tr.get_method(f"pixelprune:{bad}")


def test_nan_pixels_are_an_error():
    x = torch.rand(1, 6, 3)
    x[0, 4, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.get_method("pixelprune:tolerance=2").plan(tr.Evidence(x, grid=(2, 3)))
