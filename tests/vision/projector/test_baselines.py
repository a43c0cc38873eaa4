"""Baselines before the language model: random, uniform, pooling and down-sampling."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from visual import ORIGINS, anyres, grid, noise, visual

import tokenreduce as tr
from tokenreduce.algorithms.baseline import cells, full_grid
from tokenreduce.core.budget import count
from tokenreduce.core.plan import Pool
from tokenreduce.vision.projector.pool import PoolTokens
from tokenreduce.vision.projector.random_drop import RandomTokens
from tokenreduce.vision.projector.resize import ResizeTokens
from tokenreduce.vision.projector.uniform import UniformTokens


def picture(x, rows, cols):
    """(B,N,D) tokens as (B,D,rows,cols)."""
    return x.transpose(1, 2).reshape(len(x), -1, rows, cols)


def resized(x, rows, cols, height, width):
    """(B,D,height,width). Lying down where there is one column, which PyTorch 2 may take for another memory layout."""
    lying, size = width == 1, (width, height) if width == 1 else (height, width)
    x = picture(x, rows, cols)
    out = F.interpolate(x.transpose(2, 3) if lying else x, size=size, mode="bilinear", antialias=True)
    return out.transpose(2, 3) if lying else out


def tokens(x):
    return x.flatten(2).transpose(1, 2)


# -- random ------------------------------------------------------------------------------------------------------------
def test_random_differs_by_seed_and_image_only():
    reducer, evidence = RandomTokens(keep=9), visual(ORIGINS["large"], batch=3)
    keep = reducer.plan(evidence).keep
    assert torch.equal(keep, reducer.plan(evidence).keep)
    assert len({tuple(row) for row in keep.tolist()}) == 3
    assert (keep.diff(dim=1) > 0).all()
    assert not torch.equal(keep, RandomTokens(keep=9, seed=1).plan(evidence).keep)
    shuffled = visual(ORIGINS["large"], batch=3, rows=torch.tensor([2, 0, 1]))
    assert torch.equal(reducer.plan(shuffled).keep, keep[[2, 0, 1]])


def test_random_takes_any_view_alike():
    """A draw over the whole image: two tokens stay with the probability of a uniform pair."""
    assert RandomTokens.whole
    n, samples = 10, 6000
    keep = RandomTokens(keep=4).plan(tr.Evidence(noise(samples, n, 8))).keep
    stays = torch.zeros(samples, n).scatter(1, keep, 1.0)
    # Five standard errors of slack.
    assert (stays.mean(0) - 0.4).abs().max() < 5 * math.sqrt(0.24 / samples)
    together = (stays.T @ stays / samples)[~torch.eye(n, dtype=torch.bool)]
    p = 4 / 10 * 3 / 9
    assert (together - p).abs().max() < 5 * math.sqrt(p * (1 - p) / samples)


def test_random_keeps_what_is_in_front():
    plan = RandomTokens(keep=3).plan(tr.Evidence(noise(2, 9, 8), protected=1))
    assert plan.keep[:, 0].tolist() == [0, 0]
    assert plan.k == 4


# -- uniform -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 7, 10, 31])
@pytest.mark.parametrize("keep", [1, 2, 0.3, 0.5, 0.9])
def test_uniform_is_every_nth_token_in_a_row(n, keep):
    plan = UniformTokens(keep=keep).plan(tr.Evidence(noise(2, n, 4), grid=(1, n)))
    k = count(keep, n)
    want = [(2 * i + 1) * n // (2 * k) for i in range(k)]
    assert plan.representatives().tolist() == [want, want]


def test_uniform_is_a_sub_grid_where_there_is_one():
    plan = UniformTokens().plan(visual(ORIGINS["large"], batch=1))  # 36 of 12 x 12
    assert plan.keep[0].tolist() == [12 * r + c for r in range(1, 12, 2) for c in range(1, 12, 2)]
    same = tr.Uniform(keep=36).plan(tr.Evidence(noise(1, 144, 4), grid=(12, 12)))
    assert torch.equal(plan.keep, same.keep), "the same rule as inside an encoder"
    plan = UniformTokens(keep=35).plan(visual(ORIGINS["large"], batch=1))
    rows, cols = ([(2 * i + 1) * 12 // (2 * k) for i in range(k)] for k in (7, 5))
    assert plan.keep[0].tolist() == [12 * r + c for r in rows for c in cols], "7 x 5"
    loose = UniformTokens(keep=5).plan(visual(grid(3, 7), batch=1))
    assert loose.keep[0].tolist() == [2, 6, 10, 14, 18], "no sub-grid of five: equal distances in raster order"


def test_uniform_on_a_crop_without_its_padding():
    evidence = visual(anyres(4, (1, 2), 1), batch=1)
    (_, overview), (_, left), (_, right) = evidence.parts()
    assert (full_grid(overview), full_grid(left), full_grid(right)) == ((4, 4), (2, 4), (2, 4))
    assert UniformTokens(keep=2).plan(left).keep.tolist() == [[5, 7]]
    assert UniformTokens(keep=4).plan(left).keep.tolist() == [[1, 3, 5, 7]]


def test_grids_are_not_guessed():
    assert full_grid(tr.Evidence(noise(1, 9, 4))) is None
    assert full_grid(tr.Evidence(noise(1, 10, 4), protected=1, grid=(3, 3))) == (3, 3)
    assert full_grid(tr.Evidence(noise(1, 9, 4), grid=(4, 4))) is None
    assert full_grid(visual(ORIGINS["square"].take(torch.tensor([0, 1, 2, 4, 5])))) is None
    assert full_grid(visual(ORIGINS["square"].take(torch.tensor([5, 6, 9, 10])))) == (2, 2)
    assert full_grid(visual(ORIGINS["square"].take(torch.tensor([6, 5, 9, 10])))) is None, "not in raster order"


# -- pool --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "cols", "kernel"),
    [(12, 12, 2), (12, 12, 3), (4, 8, 2), (6, 9, 3), (6, 8, (3, 2)), (4, 6, (4, 6))],
)
def test_pool_is_average_pooling(rows, cols, kernel):
    evidence = visual(grid(rows, cols))
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    want = tokens(F.avg_pool2d(picture(evidence.x, rows, cols), (kh, kw)))
    first = [r * cols + c for r in range(0, rows, kh) for c in range(0, cols, kw)]
    reducers = [PoolTokens(kernel=kernel)]
    if kh == kw:
        reducers += [PoolTokens(keep=len(first)), PoolTokens(keep=1 / (kh * kw))]
    for reducer in reducers:
        plan = reducer.plan(evidence)
        torch.testing.assert_close(plan.reduce(evidence.x), want)
        assert plan.representatives().tolist() == [first] * 2
        assert plan.reduce(evidence.x, torch.rand(2, rows * cols)).equal(plan.reduce(evidence.x)), "a plain mean"
        assert (plan.reduce_size(None) == kh * kw).all()


@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (1, 5), (3, 1), (5, 5), (7, 3), (24, 24), (3, 17)])
def test_pool_cells_are_blocks_of_about_one_size(rows, cols):
    n = rows * cols
    evidence = visual(grid(rows, cols), batch=1)
    for keep in {1, 2, 3, n // 3, n // 2, n - 1} & set(range(1, n)):
        plan = PoolTokens(keep=keep).plan(evidence)
        assert plan.k == keep
        source, first = plan.sources()[0], plan.representatives()[0].tolist()
        assert first == sorted(first)
        heights, bands = set(), {}
        for j in range(keep):
            members = (source == j).nonzero().flatten()
            assert first[j] == int(members.min())
            r, c = members // cols, members % cols
            height, width = int(r.max() - r.min()) + 1, int(c.max() - c.min()) + 1
            assert len(members) == height * width, "a block without holes"
            heights.add(height)
            bands.setdefault(int(r.min()), []).append(width)
        assert max(heights) - min(heights) <= 1
        assert all(max(w) - min(w) <= 1 and sum(w) == cols for w in bands.values())
        each = [len(w) for w in bands.values()]
        assert max(each) - min(each) <= 1


def test_pool_worked_example():
    """3 x 7 tokens to five: two bands give cells of 1 x 2.3 and 2 x 3.5, one would give 3 x 1.4."""
    evidence = visual(grid(3, 7), batch=1)
    plan = PoolTokens(keep=5).plan(evidence)
    blocks = [[0, 1, 2], [3, 4], [5, 6], [7, 8, 9, 10, 14, 15, 16, 17], [11, 12, 13, 18, 19, 20]]
    out = plan.reduce(evidence.x)[0]
    for j, members in enumerate(blocks):
        torch.testing.assert_close(out[j], evidence.x[0, members].mean(0))
    assert plan.representatives()[0].tolist() == [0, 3, 5, 7, 11]


@pytest.mark.parametrize("gone", [[0], [15], [5, 6], [0, 1, 2, 3, 7], [12, 13, 14, 15, 3, 7, 11]])
def test_pool_of_shapes_with_holes(gone):
    left = [i for i in range(16) if i not in gone]
    evidence = visual(grid(4, 4).take(torch.tensor(left)), batch=1)
    for keep in range(1, len(left)):
        plan = PoolTokens(keep=keep).plan(evidence)
        counts = torch.bincount(plan.sources()[0], minlength=keep)
        assert plan.k == keep
        assert (counts > 0).all()
        assert counts.sum() == len(left), "every token is in one cell"
        for j in range(keep):
            members = (plan.sources()[0] == j).nonzero().flatten()
            torch.testing.assert_close(plan.reduce(evidence.x)[0, j], evidence.x[0, members].mean(0))
            assert int(plan.representatives()[0, j]) == int(members.min())


def test_pool_kernel_that_does_not_divide():
    """5 x 6 tokens in kernels of 2: 7.5 cells, rounded half up to 8, in bands of 1 and 2 rows."""
    evidence = visual(grid(5, 6), batch=1)
    reducer = PoolTokens(kernel=2)
    assert reducer.total(30) == 8
    assert reducer.plan(evidence).k == 8
    wide, tall = (PoolTokens(kernel=k, keep=6).plan(visual(grid(6, 6), batch=1)) for k in ((1, 6), (6, 1)))
    assert wide.representatives()[0].tolist() == [0, 6, 12, 18, 24, 30]
    assert tall.representatives()[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert reducer.at(3).total(30) == 3, "the share of one view"


def test_pool_keeps_what_is_in_front_and_refuses_frames_without_views():
    evidence = tr.Evidence(noise(2, 17, 4), protected=1)
    out = PoolTokens(kernel=2).plan(evidence).reduce(evidence.x)
    assert torch.equal(out[:, 0], evidence.x[:, 0])
    torch.testing.assert_close(out[:, 1:], tokens(F.avg_pool2d(picture(evidence.x[:, 1:], 4, 4), 2)))
    with pytest.raises(ValueError, match="give every frame as a view"):
        PoolTokens().plan(tr.Evidence(noise(1, 32, 4), grid=(2, 4, 4)))


def test_cells_share_out_by_room():
    rows = [[0], [0, 1], [0, 1, 2, 3]]
    assert [(list(band), cut) for band, _, cut in cells(rows, 6)] == [([0], 1), ([1], 2), ([2], 3)]
    with pytest.raises(ValueError, match="7 tokens cannot be cut into 8 cells"):
        cells(rows, 8)


# -- resize ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "cols", "small"),
    [(24, 24, (10, 10)), (24, 24, (17, 17)), (6, 12, (2, 4)), (5, 10, (4, 8))],
)
def test_resize_is_antialiased_bilinear(rows, cols, small):
    evidence = visual(grid(rows, cols))
    plan = ResizeTokens(keep=small[0] * small[1]).plan(evidence)
    want = resized(evidence.x, rows, cols, *small)
    torch.testing.assert_close(plan.reduce(evidence.x), tokens(want), rtol=1e-4, atol=1e-5)
    assert isinstance(plan, Pool)


@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (1, 5), (3, 1), (5, 5), (7, 3), (24, 24), (3, 17)])
def test_resize_rows_of_unequal_numbers(rows, cols):
    """Every row of outputs is that row of a resized picture with as many rows, and as many columns as this one has."""
    n = rows * cols
    evidence = visual(grid(rows, cols), batch=1)
    for keep in {1, 2, 3, n // 3, n // 2, n - 1} & set(range(1, n)):
        plan = ResizeTokens(keep=keep).plan(evidence)
        out, at = plan.reduce(evidence.x), 0
        bands = [cut for _, _, cut in cells([range(cols)] * rows, keep)]
        assert sum(bands) == keep == plan.k
        for i, cut in enumerate(bands):
            want = resized(evidence.x, rows, cols, len(bands), cut)[:, :, i].transpose(1, 2)
            torch.testing.assert_close(out[:, at : at + cut], want, rtol=1e-4, atol=1e-5)
            at += cut
        own = plan.representatives()[0].tolist()
        assert own == sorted(set(own))


def test_resize_stands_at_the_centres():
    plan = ResizeTokens(keep=4).plan(visual(grid(6, 6), batch=1))
    assert plan.representatives()[0].tolist() == [7, 10, 25, 28]
    front = ResizeTokens(keep=4).plan(tr.Evidence(noise(1, 37, 4), protected=1))
    assert front.representatives()[0].tolist() == [0, 8, 11, 26, 29]
    assert front.untouched()[0].tolist() == [True, False, False, False, False]


def test_resize_needs_a_grid():
    left = visual(grid(4, 4).take(torch.arange(1, 16)), batch=1)
    with pytest.raises(ValueError, match="needs a full grid of tokens"):
        ResizeTokens(keep=4).plan(left)
    part = visual(grid(4, 4).take(torch.arange(4, 16)), batch=1)
    assert ResizeTokens(keep=3).plan(part).k == 3, "cutting off padding leaves a grid"


@pytest.mark.parametrize("reducer", [UniformTokens(keep=0.4), RandomTokens(keep=0.4)])
def test_row_ends_that_must_stay(reducer):
    """A mask takes them out first."""
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 4::5] = True
    plan = reducer.plan(tr.Evidence(noise(2, 20, 8), protected=mask))
    stays = plan.sources() >= 0
    assert stays[mask].all()
    assert (stays.sum(1) == 4 + 6).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomTokens(seed=-1), "seed is an int >= 0"),
        (lambda: PoolTokens(kernel=0), "kernel is an int >= 1"),
        (lambda: PoolTokens(kernel=(2, 0)), "kernel is an int >= 1"),
        (lambda: PoolTokens(kernel=(2, 2, 2)), "kernel is a number of rows and columns"),
        (lambda: PoolTokens(kernel="big"), "kernel is an int >= 1"),
        (lambda: PoolTokens(keep=0, kernel=2), "keep is a number of tokens"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_texts():
    assert tr.get_method("pool:kernel=[2,3]") == PoolTokens(kernel=(2, 3)) == PoolTokens(kernel=[2, 3])
    assert tr.get_method(PoolTokens(kernel=3).spec()) == PoolTokens(kernel=3)
    assert PoolTokens(kernel=3).total(576) == 64
    assert PoolTokens().total(576) == 144
    for kind in (RandomTokens, UniformTokens, ResizeTokens):
        short = kind.name.partition("@")[0]
        assert tr.get_method(f"{short}:keep=5", "projector") == kind(keep=5)
        assert kind(keep=5).spec() == f"{short}@projector:keep=5"
