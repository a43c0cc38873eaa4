"""Duplicate frames merged and a balanced budget, against the steps of the card in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.core.plan import Plan
from tokenreduce.video.projector import frame_merge
from tokenreduce.video.projector.frame_merge import FrameMerge, nearest_earlier


def unit(v):
    return v / max(float(v.norm()), 1e-12)


def step(tokens, r):
    """One bipartite step on a list of (place, vector, members)."""
    evens, odds = tokens[::2], tokens[1::2]
    best = []
    for _, v, _ in evens:
        cosines = [float(unit(v) @ unit(w)) for _, w, _ in odds]
        j = max(range(len(odds)), key=lambda j: (cosines[j], -j))
        best.append((cosines[j], j))
    ranked = sorted(range(len(evens)), key=lambda i: (-best[i][0], i))
    gone, out = ranked[:r], [evens[i] for i in ranked[r:]]
    for j, (place, v, members) in enumerate(odds):
        mine = [i for i in gone if best[i][1] == j]
        mean = torch.stack([v, *(evens[i][1] for i in mine)]).mean(0)
        out.append((place, mean, members + [m for i in mine for m in evens[i][2]]))
    return out


def groups(x, keep, threshold):
    """Frames of every group on one video (T,n,C), chains followed; exactly ``keep`` tokens must be able to come out."""
    t, n, _ = x.shape
    mean = x.mean(1)
    links = []
    for i in range(1, t):
        s = [round((float(unit(mean[i]) @ unit(mean[j])) + 1) / 2, 6) for j in range(i)]
        j = max(range(i), key=lambda j: (s[j], -j))
        links.append((s[j], i, j))
    links.sort(key=lambda link: (-link[0], link[1]))
    number = sum(s > threshold for s, _, _ in links)
    while t - number > keep:
        number += 1
    while (t - number) * n < keep:
        number -= 1
    group = list(range(t))
    for _, i, j in links[:number]:  # relabel: no order of links matters
        group = [group[j] if g == group[i] else g for g in group]
    return [[i for i in range(t) if group[i] == g] for g in sorted(set(group), key=group.index)]


def reference(x, t, keep, threshold=0.975):
    """Outputs (place, value, members) of one video (T*n,C)."""
    x = x.double().view(t, -1, x.shape[-1])
    n, out = x.shape[1], []
    frames = groups(x, keep, threshold)
    for g, members in enumerate(frames):
        share = keep // len(frames) + (g < keep % len(frames))
        mean = torch.stack([x[f] for f in members]).mean(0)
        tokens = [(members[0] * n + j, mean[j], [f * n + j for f in members]) for j in range(n)]
        while len(tokens) > share:
            tokens = step(tokens, min(len(tokens) // 2, len(tokens) - share))
        out += tokens
    return out


def film(t, n, scenes, noise=0.05, batch=2, c=6):
    """Frames of a few scenes, told apart by their means, in turn."""
    base = torch.randn(batch, scenes, 1, c) * 2 + torch.randn(batch, scenes, n, c)
    frames = base[:, [i * scenes // t for i in range(t)]]
    return (frames + noise * torch.randn(batch, t, n, c)).flatten(1, 2)


def check(plan: Plan, x, t, keep, threshold=0.975, prefix=0):
    out, sources, places, same = plan.reduce(x), plan.sources(), plan.representatives(), plan.untouched()
    assert plan.k == keep + prefix
    for b in range(len(x)):
        tokens = reference(x[b, prefix:], t, keep, threshold)
        assert places[b].tolist() == [*range(prefix), *(prefix + place for place, _, _ in tokens)]
        for k, (_, value, members) in enumerate(tokens):
            torch.testing.assert_close(out[b, prefix + k], value.float(), rtol=1e-4, atol=1e-5)
            assert (sources[b] == prefix + k).nonzero().flatten().tolist() == sorted(prefix + m for m in members)
            assert bool(same[b, prefix + k]) is (len(members) == 1)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize("part", [0.1, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("scenes", [1, 3])
def test_is_the_card(t, n, part, scenes):
    keep = int(t * n * part)
    if keep < 1:
        return
    x = film(t, n, scenes)
    plan = FrameMerge(keep=keep).plan(tr.Evidence(x, grid=(t, 1, n)))
    check(plan, x, t, keep)
    for b in range(2):
        alone = FrameMerge(keep=keep).plan(tr.Evidence(x[b : b + 1], grid=(t, 1, n)))
        assert torch.equal(alone.representatives()[0], plan.representatives()[b])
        torch.testing.assert_close(alone.reduce(x[b : b + 1])[0], plan.reduce(x)[b])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 0.9, 1.0])
def test_thresholds(threshold):
    x = torch.randn(2, 6, 1, 5).add(0.5 * torch.randn(2, 6, 8, 5)).flatten(1, 2)
    check(FrameMerge(keep=12, threshold=threshold).plan(tr.Evidence(x, grid=(6, 2, 4))), x, 6, 12, threshold)


def test_worked_example():
    """Frames A A' B A'': one group of three, so that 4 tokens are 2 of A's mean, in part merged, and 2 of B."""
    a = torch.tensor([[4.0, 0.0], [4.0, 1.0], [3.0, 1.0]])
    b = torch.tensor([[0.0, 4.0], [-1.0, 4.0], [0.0, 3.0]])
    x = torch.cat([a, a + 0.3, b, a - 0.3])[None]
    plan = FrameMerge(keep=4).plan(tr.Evidence(x, grid=(4, 1, 3)))
    assert plan.sources()[0].view(4, 3).tolist() == [[0, 1, 1]] * 2 + [[3, 3, 2]] + [[0, 1, 1]]
    assert plan.representatives()[0].tolist() == [0, 1, 8, 7]
    want = torch.stack([a[0], (a[1] + a[2]) / 2, b[2], (b[0] + b[1]) / 2])
    torch.testing.assert_close(plan.reduce(x)[0], want)


def test_chains_are_followed_to_their_end():
    """Each frame is alike only to the one before: all three become one, and none is lost."""
    turn = torch.tensor([[1.0, 0.0], [0.9, 0.44], [0.62, 0.78]])
    x = turn[None].repeat_interleave(2, 1)
    parent, alike = nearest_earlier(turn[None])
    assert parent.tolist() == [[0, 0, 1]]
    assert alike[0, 0] == -1
    assert float(turn[0] @ turn[2]) < 0.8  # (cos + 1) / 2 below the threshold of 0.93
    plan = FrameMerge(keep=1, threshold=0.93).plan(tr.Evidence(x, grid=(3, 1, 2)))
    assert plan.sources().tolist() == [[0] * 6]
    torch.testing.assert_close(plan.reduce(x)[0, 0], turn.mean(0))
    assert FrameMerge(keep=2, threshold=0.93).plan(tr.Evidence(x, grid=(3, 1, 2))).sources().tolist() == [[0, 1] * 3]


def test_balance():
    """Fewer distinct frames get more tokens each."""

    def per_frame(scenes):
        plan = FrameMerge(keep=12).plan(tr.Evidence(film(6, 8, scenes, noise=0.01, c=32), grid=(6, 2, 4)))
        return [torch.bincount(r // 8, minlength=6).tolist() for r in plan.representatives()]

    assert per_frame(2) == [[6, 0, 0, 6, 0, 0]] * 2
    assert per_frame(3) == [[4, 0, 4, 0, 4, 0]] * 2
    assert per_frame(6) == [[2] * 6] * 2


def test_the_budget_decides_how_many_frames_may_be_one():
    """A still video: enough frames stay apart for the budget. Frames that all differ: some become one for it."""
    x = torch.randn(1, 4, 7).repeat(1, 5, 1)
    for keep, heads in ((4, 1), (5, 2), (8, 2), (9, 3), (19, 5)):
        plan = FrameMerge(keep=keep).plan(tr.Evidence(x, grid=(5, 2, 2)))
        assert plan.k == keep
        assert len(set((plan.representatives()[0] // 4).tolist())) == heads
    x = torch.eye(5).repeat_interleave(4, 0)[None] + 0.01 * torch.rand(1, 20, 5)
    for keep, heads in ((1, 1), (2, 2), (4, 4), (7, 5)):
        plan = FrameMerge(keep=keep).plan(tr.Evidence(x, grid=(5, 2, 2)))
        assert len(set((plan.representatives()[0] // 4).tolist())) == heads
        check(plan, x, 5, keep)


def test_many_frames_are_compared_a_few_at_a_time(monkeypatch):
    x = film(9, 4, 5, noise=0.3)
    e = tr.Evidence(x, grid=(9, 2, 2))
    whole = FrameMerge(keep=15).plan(e)
    monkeypatch.setattr(frame_merge, "_CHUNK", 2)
    assert FrameMerge(keep=15).plan(e).sources().equal(whole.sources())
    parent, alike = nearest_earlier(x.view(2, 9, 4, -1).mean(2))
    monkeypatch.undo()
    want, close = nearest_earlier(x.view(2, 9, 4, -1).mean(2))
    assert torch.equal(parent, want)
    torch.testing.assert_close(alike, close)


def test_zero_frames_prefix_half_precision_and_nan():
    x = film(5, 4, 2)
    x[:, 8:12] = 0
    check(FrameMerge(keep=7).plan(tr.Evidence(x, grid=(5, 2, 2))), x, 5, 7)
    x = torch.cat([torch.randn(2, 1, 6), film(5, 4, 2)], 1)
    e = tr.Evidence(x, protected=1, grid=(5, 2, 2))
    plan = FrameMerge(keep=7).plan(e)
    check(plan, x, 5, 7, prefix=1)
    assert torch.equal(plan.reduce(x)[:, 0], x[:, 0])
    half = FrameMerge(keep=7).plan(tr.Evidence(x.half(), protected=1, grid=(5, 2, 2))).reduce(x.half())
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()
    x[1, 9, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        FrameMerge(keep=7).plan(e)


def test_sizes_are_summed_and_do_not_weigh():
    x = film(4, 4, 2)
    plan = FrameMerge(keep=5).plan(tr.Evidence(x, grid=(4, 2, 2)))
    size = torch.rand(2, 16) + 0.5
    assert torch.equal(plan.reduce(x, size), plan.reduce(x))
    torch.testing.assert_close(plan.reduce_size(size).sum(1), size.sum(1))


def test_a_model():
    e = visual(ORIGINS["frames"])
    check(FrameMerge(keep=20).plan(e), e.x, 3, 20)
    assert FrameMerge().plan(e).is_identity, "576 tokens are more than there are"


@pytest.mark.parametrize("bad", [-0.1, 1.1, True, "all", float("nan")])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"threshold is a number in \[0, 1\]"):
        FrameMerge(threshold=bad)
    with pytest.raises(ValueError, match="keep"):
        FrameMerge(keep=0)
