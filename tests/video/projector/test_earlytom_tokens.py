"""The choice of EarlyTom behind the projector against its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import tokenreduce as tr
from tokenreduce.video.projector.earlytom_tokens import best_of_windows


def by_hand(rows, segment, ratio):
    """[(frame, token)] that stay of a video with attention ``rows`` (T lists of S) and a segment for every frame."""
    frames, s = len(rows), len(rows[0])
    left = [i for i in range(frames) if segment[i] >= 0]
    share = round(s * min(ratio * frames / len(left), 1), 6)
    out = []
    for number in sorted({segment[i] for i in left}):
        mine = [i for i in left if segment[i] == number]
        for i in mine:
            if len(mine) <= 2 or i in (mine[0], mine[-1]):
                out += [(i, j) for j in sorted(range(s), key=lambda j: (-rows[i][j], j))[: math.ceil(share)]]
                continue
            windows, at = max(1, round(share)), 0
            for w in range(windows):
                length = s // windows + (1 if w < s % windows else 0)
                out.append((i, max(range(at, at + length), key=lambda j: (rows[i][j], -j))))
                at += length
    return sorted(out)


def shown(rows, segments, prefix=0, **more):
    """Evidence of videos whose tokens received ``rows`` (B,T,S) attention, behind a prefix."""
    b, t, s = rows.shape
    flat = torch.cat([torch.zeros(b, prefix), rows.flatten(1)], 1)
    return tr.Evidence(
        torch.randn(b, prefix + t * s, 4), attention=flat[:, None, None].expand(-1, 2, 2, -1), protected=prefix,
        grid=(t, 1, s), segments=segments, cls=False, **more,
    )  # fmt: skip


def part(ratio):
    return tr.EarlyTom(keep=ratio).parts()[1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("places", [1, 5, 13, 16])
def test_the_plan_is_the_cards(places, ratio, prefix, ties):
    """Three videos of one call: unequal segments, unequal numbers of frames that are left."""
    g = torch.Generator().manual_seed(places)
    rows = torch.rand(3, 9, places, generator=g)
    rows = (rows * 3).round() if ties else rows
    segments = torch.tensor([
        [0, 0, 0, 0, 1, 1, 2, 2, 2], [0, -1, 0, -1, 0, 0, 1, -1, 1], [0, 1, 1, 1, 1, 1, -1, -1, 1],
    ])  # fmt: skip
    plan = part(ratio).plan(shown(rows, segments, prefix))
    sources = plan.sources()
    assert (sources[:, :prefix] >= 0).all()
    for mine, segment, where in zip(rows.tolist(), segments.tolist(), sources[:, prefix:] >= 0, strict=True):
        want = [f * places + j for f, j in by_hand(mine, segment, ratio)]
        assert where.nonzero().flatten().tolist() == want
    assert plan.k == max(int((one >= 0).sum()) for one in sources)


def test_windows_are_one_longer_at_the_front():
    scores = torch.zeros(1, 11)
    assert best_of_windows(scores, 3)[0].nonzero().flatten().tolist() == [0, 4, 8]
    assert best_of_windows(scores, 11).all()


def test_one_frame_needs_no_segments_and_several_do():
    rows = torch.rand(2, 1, 10, generator=torch.Generator().manual_seed(0))
    plan = part(0.25).plan(shown(rows, None))
    assert torch.equal(plan.representatives(), rows[:, 0].topk(3).indices.sort(1).values)
    with pytest.raises(ValueError, match="segments"):
        part(0.25).plan(shown(rows.view(1, 2, 10), None))


def test_everything_and_nan():
    rows = torch.rand(1, 4, 6)
    segments = torch.zeros(1, 4, dtype=torch.long)
    assert part(1.0).plan(shown(rows, segments)).is_identity
    rows[0, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        part(0.5).plan(shown(rows, segments))


def test_it_is_a_part_of_the_method_that_a_user_names():
    method = tr.get_method("earlytom:keep=0.25,positions=original")
    first, second = method.parts()
    assert first is method
    assert (second.stage, second.spec(), second.positions) == ("projector", method.spec(), "original")
    assert tr.EarlyTom().parts() == (tr.EarlyTom(),)
    assert "earlytom" not in tr.list_methods(stage="projector")
