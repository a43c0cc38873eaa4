"""AdaptVision's partition and pooling against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import tokenreduce as tr
from tokenreduce.algorithms.tiling import partition
from tokenreduce.core.evidence import ImageEvidence, Origin


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 80), (1, 1)), ((337, 336), (2, 2)), ((640, 480), (2, 2)), ((673, 200), (3, 1)), ((336, 700), (2, 3)),
        ((1200, 400), (3, 1)), ((2000, 1500), (3, 3)), ((3000, 100), (3, 1)), ((1, 500), (1, 2)), ((336, 336), (1, 1)),
    ],
)  # fmt: skip
def test_published_examples_of_the_partition(size, grid):
    made = partition(*size)
    assert (made.columns, made.rows) == grid
    assert made.size == (grid[0] * 336, grid[1] * 336)


def test_the_partition_is_the_one_by_hand():
    for width in range(1, 60, 7):
        for height in range(1, 60, 5):
            long, short = max(width, height), min(width, height)
            a = min(math.ceil(long / 10), 4)
            b = min(math.ceil(max(a * 10 * short // long, 1) / 10), 4)
            made = partition(width, height, tile=10, most=4)
            assert (made.rows, made.columns) == ((a, b) if height >= width else (b, a))


def test_views_are_the_thumbnail_and_the_tiles():
    assert partition(20, 10, tile=10).views == (
        ((0, 0), (0, 0, 20, 10)), ((1, 1), (0, 0, 10, 10)), ((1, 2), (10, 0, 20, 10)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="width"):
        partition(0, 10)


def crops_of(side=3, rows=1, columns=2, batch=2):
    """An overview and crops whose rows are interleaved, as families that tile an image pack them, of side x side."""
    views, places = [0] * side**2, [divmod(i, side) for i in range(side**2)]
    for r in range(rows * side):
        for c in range(columns * side):
            views.append(1 + r // side * columns + c // side)
            places.append((r, c))
    n = len(views)
    view, place = torch.tensor(views), torch.tensor(places)
    index = torch.zeros(n, 1, dtype=torch.long)
    origin = Origin(index, None, side**2, view, place, (side, side), (rows, columns), 1 + rows * columns)
    x = torch.randn(batch, n, 4, generator=torch.Generator().manual_seed(0))
    return ImageEvidence(x, origin), views, places


@pytest.mark.parametrize("cell", ["strip", "square"])
def test_four_tokens_of_a_crop_become_one(cell):
    evidence, views, places = crops_of()
    plan = tr.get_method(f"adaptvision:cell={cell}").plan(evidence)
    groups, met = {}, {}
    for i, (v, (r, c)) in enumerate(zip(views, places, strict=True)):
        met[v] = met.get(v, -1) + 1
        key = (i,) if v == 0 else (v, met[v] // 4) if cell == "strip" else (v, r // 2, c // 2)
        groups.setdefault(key, []).append(i)
    want = torch.stack([evidence.x[:, members].mean(1) for members in groups.values()], 1)
    assert (
        plan.k
        == len(groups)
        == 9
        + (
            2 * 3
            if cell == "strip"
            else len({(v, r // 2, c // 2) for v, (r, c) in zip(views, places, strict=True) if v})
        )
    )
    torch.testing.assert_close(plan.reduce(evidence.x), want)
    assert plan.representatives()[0].tolist() == [members[0] for members in groups.values()]


@pytest.mark.parametrize(("keep", "crops"), [(5, (0, 0)), (9, (0, 0)), (12, (2, 1)), (25, (8, 8))])
def test_keep_gives_the_overview_its_tokens_first(keep, crops):
    evidence, views, _ = crops_of()
    plan = tr.get_method(f"adaptvision:keep={keep}").plan(evidence)
    assert plan.k == keep
    owners = [views[i] for i in plan.representatives()[0].tolist()]
    assert [owners.count(v) for v in (1, 2)] == list(crops)


def test_an_image_of_one_view_is_its_own_overview():
    x = torch.randn(1, 9, 4)
    assert tr.get_method("adaptvision").plan(tr.Evidence(x, grid=(3, 3))).is_identity
    with pytest.raises(ValueError, match="strip"):
        tr.get_method("adaptvision:cell=square,keep=4")


def test_row_ends_are_in_no_view_and_are_refused():
    evidence, _, _ = crops_of()
    view = evidence.origin.view.clone()
    view[-1] = -1
    ends = replace(evidence.origin, view=view)
    with pytest.raises(ValueError, match="row ends are in none; give newlines='keep'"):
        tr.get_method("adaptvision:keep=12").plan(ImageEvidence(evidence.x, ends))
