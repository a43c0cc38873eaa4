"""V-CAST against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b, eps):
    return float(a @ b) / (max(float(a.norm()), eps) * max(float(b.norm()), eps))


def reference(x, total, min_k=1, temperature=0.7):
    """Kept tokens of one video (T,n,C), numbered frame by frame."""
    t, n, _ = x.shape
    r = [f.mean(0) / max(float(f.mean(0).norm()), 1e-12) for f in x]
    turn = [1.0] * t
    for i in range(1, t - 1):
        turn[i] = 1 - cosine(r[i] - r[i - 1], r[i + 1] - r[i], 1e-6)
    w = (torch.tensor(turn) / temperature).softmax(0).tolist()
    least = min_k if total >= t * min_k else 0
    rest = total - t * least
    k = [min(n, least + math.floor(w[i] * rest)) for i in range(t)]
    fraction = [w[i] * rest - math.floor(w[i] * rest) for i in range(t)]
    while sum(k) < total:
        i = max((i for i in range(t) if k[i] < n), key=lambda i: (fraction[i], -i))
        k[i] += 1
    out = []
    for f in range(t):
        norms = [float(v.norm()) for v in x[f]]
        low, high = min(norms), max(norms)
        score = [1 - cosine(x[f, i], r[f], 1e-12) + (norms[i] - low) / (high - low + 1e-6) for i in range(n)]
        out += [f * n + i for i in sorted(sorted(range(n), key=lambda i: (-score[i], i))[: k[f]])]
    return out


@pytest.mark.parametrize(("t", "n"), [(1, 9), (2, 6), (3, 9), (7, 4), (5, 1), (16, 12)])
@pytest.mark.parametrize("keep", [0.25, 0.6, 1, 3, 9])
def test_is_the_choice_of_the_card(t, n, keep):
    x = noise(2, t, n, 10, seed=t)
    x = x + 2 * noise(2, t, 1, 10, seed=t + 1)
    total = min(keep, t * n) if isinstance(keep, int) else max(1, round(keep * t * n))
    plan = tr.VCAST(keep=keep).plan(tr.Evidence(x.flatten(1, 2), grid=(t, 1, n)))
    for b in range(2):
        assert plan.representatives()[b].tolist() == reference(x[b], total)


def test_a_turn_gets_more():
    """The path of the frames goes on, turns back once, and goes on."""
    line = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0])[:, None] * torch.tensor([0.0, 0.3, 0.0]) + torch.tensor([1.0, 0, 0])
    x = line[:, None] + 0.01 * noise(5, 10, 3)
    plan = tr.VCAST(keep=20).plan(tr.Evidence(x.flatten(0, 1)[None], grid=(5, 2, 5)))
    counts = [int((plan.keep[0] // 10 == f).sum()) for f in range(5)]
    assert counts[2] == max(counts)
    assert counts[1] == min(counts)


def test_a_still_video_shares_evenly_and_leftovers_go_to_one_frame():
    x = noise(1, 1, 9, 8).expand(1, 4, 9, 8).flatten(1, 2)
    plan = tr.VCAST(keep=18).plan(tr.Evidence(x, grid=(4, 3, 3)))
    assert [int((plan.keep[0] // 9 == f).sum()) for f in range(4)] == [6, 4, 4, 4]
    one = set(plan.keep[0][:4].tolist())
    assert len(one) == 4


def test_a_full_frame_hands_on():
    method = tr.VCAST(keep=1, min_k=0)
    assert method.quota(torch.tensor([0.7, 0.15, 0.15]), 10, 4).tolist() == [4, 4, 2]
    assert method.quota(torch.tensor([0.9, 0.1]), 8, 4).tolist() == [4, 4]


def test_official_totals():
    x = tr.Evidence(noise(1, 24, 6), grid=(6, 2, 2))
    assert tr.VCAST(keep=0.1).plan(x).k == 2
    assert tr.VCAST(keep=0.1, official_totals=True).plan(x).k == 6
    alone = tr.Evidence(noise(1, 24, 6), grid=(1, 4, 6))
    assert tr.VCAST(keep=0.5, official_totals=True).plan(alone).is_identity
    assert tr.VCAST(keep=0.5).plan(alone).k == 12


def test_equal_tokens_tie_to_the_lower_index():
    plan = tr.VCAST(keep=6).plan(tr.Evidence(torch.ones(1, 12, 4), grid=(3, 2, 2)))
    assert plan.keep.tolist() == [[0, 1, 4, 5, 8, 9]]


@pytest.mark.parametrize("bad", [{"min_k": -1}, {"temperature": 0.0}, {"keep": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.VCAST(**bad)
