"""DyCoke's temporal token merging against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.video.projector.dycoke import DyCoke


def cosine(a, b):
    return float(a @ b) / float(a.norm() * b.norm())


def thinned(t):
    """Frame -> the frame it is compared with: card, steps 2 and 3, over all complete groups of four."""
    out = {i + 1: i for i in range(0, t - 1, 2)}
    out.update({i + 2: i for i in range(0, t, 4) if i + 3 < t})
    return out


def reference(x, t, counts):
    """Card, steps 2 to 5, on one video (T*n,C): ``counts`` frame -> tokens, whole frames left out."""
    x = x.double().view(t, -1, x.shape[-1])
    n, keep = x.shape[1], []
    for f in range(t):
        if f not in counts:
            places = range(n)
        else:
            s = [cosine(x[thinned(t)[f], j], x[f, j]) for j in range(n)]
            places = sorted(sorted(range(n), key=lambda j: (s[j], j))[: counts[f]])
        keep += [f * n + j for j in places]
    return keep


@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (2, 5)])
@pytest.mark.parametrize("k", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_is_the_rule_of_the_card(t, shape, k):
    n = shape[0] * shape[1]
    x = torch.randn(2, t * n, 6)
    plan = DyCoke(dycoke_k=k).plan(tr.Evidence(x, grid=(t, *shape)))
    m = round(10 * (1 - k)) * n // 10
    for b in range(2):
        assert plan.representatives()[b].tolist() == reference(x[b], t, {f: m for f in thinned(t)})
    assert plan.is_identity is (m == n or t == 1)


def test_published_numbers():
    """32 frames of 196: 58 of a thinned frame at k = 0.7; (4-3k)/4 but for rounding down."""
    x = torch.randn(1, 32 * 196, 4)
    plan = DyCoke().plan(tr.Evidence(x, grid=(32, 14, 14)))
    assert plan.k == 8 * (196 + 3 * 58)
    assert plan.k / (32 * 196) == pytest.approx((4 - 3 * 0.7) / 4, abs=0.004)
    assert DyCoke(dycoke_k=0.9).plan(tr.Evidence(x[:, :80], grid=(8, 2, 5))).k == 2 * (
        10 + 3
    )  # not (1-0.9)*10 = 0.99..


def test_worked_example():
    """Frame 1 keeps what differs from frame 0; frame 2 is compared with 0, not with 1; frame 3 with 2."""
    a, b, c = torch.eye(3).tolist()
    x = torch.tensor([a, a, a, b, a, a, a, a, b, a, b, c])[None]
    plan = DyCoke(dycoke_k=0.6).plan(tr.Evidence(x, grid=(4, 1, 3)))
    # frame 0 (a a a), frame 1 (b a a): place 0; frame 2 (a a b): place 2; frame 3 (a b c): places 1, 2 tie, the first.
    assert plan.keep[0].tolist() == [0, 1, 2, 3, 8, 10]


@pytest.mark.parametrize(("t", "whole"), [(2, [0]), (3, [0, 2]), (4, [0]), (5, [0, 4]), (7, [0, 4, 6]), (8, [0, 4])])
def test_frames_without_a_partner_stay_whole(t, whole):
    plan = DyCoke(dycoke_k=1).plan(tr.Evidence(torch.randn(1, t * 4, 5), grid=(t, 2, 2)))
    assert plan.keep[0].tolist() == [f * 4 + j for f in whole for j in range(4)]


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3)])
def test_a_budget_is_met_exactly(t, shape):
    n = shape[0] * shape[1]
    x = torch.randn(2, t * n, 6)
    others = sorted(thinned(t))
    for keep in range(1, t * n):
        plan = DyCoke(keep=keep).plan(tr.Evidence(x, grid=(t, *shape)))
        assert plan.k == keep
        assert (plan.keep.diff(dim=1) > 0).all()
        rest = keep - n * (t - len(others))
        if rest >= 0 and others:
            counts = {f: rest // len(others) + (i < rest % len(others)) for i, f in enumerate(others)}
            for b in range(2):
                assert plan.keep[b].tolist() == reference(x[b], t, counts)
        for b in range(2):
            alone = DyCoke(keep=keep).plan(tr.Evidence(x[b : b + 1], grid=(t, *shape)))
            assert torch.equal(alone.keep[0], plan.keep[b])


def test_a_budget_below_the_whole_frames_thins_these():
    """Two whole frames of 16 for 9 tokens: 5 of the first at equal distances, the 4 of frame 4 least like frame 0."""
    x = torch.randn(1, 8 * 16, 6)
    keep = DyCoke(keep=9).plan(tr.Evidence(x, grid=(8, 4, 4))).keep[0].tolist()
    s = [cosine(x[0, j], x[0, 64 + j]) for j in range(16)]
    assert keep == [1, 4, 8, 11, 14] + sorted(64 + j for j in sorted(range(16), key=lambda j: s[j])[:4])
    assert DyCoke(keep=8).plan(tr.Evidence(x, grid=(8, 4, 4))).keep[0].tolist()[:4] == [5, 7, 13, 15]
    assert DyCoke(keep=1).plan(tr.Evidence(x, grid=(8, 4, 4))).keep[0].tolist() == [10]


def test_still_videos_tie_and_keep_the_first_places():
    x = torch.randn(1, 10, 31).repeat(1, 4, 1)
    keep = DyCoke(keep=16).plan(tr.Evidence(x, grid=(4, 2, 5))).keep[0].tolist()
    assert keep == [*range(10), 10, 11, 20, 21, 30, 31]


def test_prefix_half_precision_nan_and_a_model():
    x = torch.randn(1, 41, 16).bfloat16()
    keep = DyCoke().plan(tr.Evidence(x, protected=1, grid=(4, 2, 5))).keep[0].tolist()
    assert keep == [0] + [1 + i for i in reference(x[0, 1:].float(), 4, {f: 3 for f in (1, 2, 3)})]
    e = visual(ORIGINS["frames"])
    plan = DyCoke(dycoke_k=0.5).plan(e)
    for b in range(2):
        assert plan.keep[b].tolist() == reference(e.x[b], 3, {1: 8})
    e.x[0, 20, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        DyCoke().plan(e)


@pytest.mark.parametrize("bad", [-0.1, 1.1, True, "half", float("nan")])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"dycoke_k is a number in \[0, 1\]"):
        DyCoke(dycoke_k=bad)
