"""PruneSID against the steps of its card, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, class_row, visual

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x, need, importance=None, own=0):
    """Chosen tokens of one image (N,C), group by group; ``importance`` is the class token's attention."""
    n, c = x.shape
    q = min(max(int(need / 4), 1 if importance is not None else 4), n, c)
    a = (1 / (1 + (-x.double()).exp())).T
    a = a - torch.stack([a[:, i].mean() for i in range(n)])
    v = torch.linalg.svd(a)[2][:q].T.abs()
    group = [max(range(q), key=lambda j: (float(v[i, j]), -j)) for i in range(n)]
    s = [float(v[i, group[i]]) for i in range(n)] if importance is None else importance
    cos = [[float(p @ r) / max(float(p.norm() * r.norm()), 1e-12) for r in x] for p in x]
    if importance is not None:
        tau = need / 32 * sum(cos[i][j] for i in range(n) for j in range(i + 1, n)) / (n * (n - 1) / 2)
    else:
        tau = max(need / (n / 18), 1) * sum(cos[i][j] for i in range(n) for j in range(i, n)) / n**2
    ranked, picks = [], []
    for g in range(q):
        left = [i for i in range(n) if group[i] == g]
        mine, gone = [], []
        while left:
            best = max(left, key=lambda i: (s[i], -i))
            mine.append(best)
            left.remove(best)
            near = [i for i in left if cos[best][i] > tau]
            gone += near
            left = [i for i in left if i not in near]
        ranked.append(mine + sorted(gone, key=lambda i: (-s[i], i)))
        picks.append(len(mine))
    low = [min(1, len(m)) for m in ranked]
    up = [min(5 * math.ceil(need / 64), len(m), p) for m, p in zip(ranked, picks, strict=True)]
    while sum(up) < need:
        up = [min(u + 1, len(m)) for u, m in zip(up, ranked, strict=True)]
    other = max(0, need - sum(low) - own)
    cum = [round(other * sum(picks[: g + 1]) / sum(picks)) for g in range(q)]
    quota = [min(cum[g] - (cum[g - 1] if g else 0) + low[g], up[g]) for g in range(q)]
    for g in sorted(range(q), key=lambda g: -picks[g]):
        while quota[g] < up[g] and sum(quota) < other + sum(low):
            quota[g] += 1
    return [i for g in range(q) for i in ranked[g][: quota[g]]]


def groups(n, c, seed):
    """Features around some directions, with a common part, so that cosines are mostly positive."""
    return noise(5, c, seed=seed)[torch.arange(n) % 5] + 0.7 * noise(n, c, seed=seed + 1) + 0.5


@pytest.mark.parametrize(("n", "c"), [(9, 16), (25, 40), (48, 20), (31, 64)])
@pytest.mark.parametrize("keep", [4, 7, 16, 0.5])
def test_without_class_token(n, c, keep):
    x = torch.stack([groups(n, c, 0), groups(n, c, 9)])
    method = tr.PruneSID(keep=keep)
    need = method.total(n)
    plan = method.plan(tr.Evidence(x))
    if need >= n:
        assert plan.is_identity
        return
    for b in range(2):
        assert plan.keep[b].tolist() == reference(x[b], need)
    raster = tr.PruneSID(keep=keep, order="raster").plan(tr.Evidence(x))
    assert torch.equal(raster.keep, plan.keep.sort(1).values)


@pytest.mark.parametrize("keep", [4, 9, 13, 30])
def test_with_class_token(keep):
    n, c = 36, 48
    x = torch.stack([groups(n + 1, c, 3), groups(n + 1, c, 8)])
    rows = noise(2, 3, 1, n + 1, seed=5).softmax(-1)
    plan = tr.PruneSID(keep=keep).plan(tr.Evidence(x, attention=rows, protected=1))
    assert plan.k == keep
    for b in range(2):
        seen = rows[b, :, 0, 1:].sum(0).tolist()
        assert plan.keep[b].tolist() == [0, *(1 + i for i in reference(x[b, 1:], keep, seen, 1))]


def test_in_front_of_a_tower():
    e = visual(ORIGINS["square"]).in_vision(True)
    plan = tr.PruneSID(keep=6).plan(e)
    for b in range(2):
        want = reference(e.x[b, 1:], 6, class_row(e, None, b).tolist(), 1)
        assert plan.keep[b].tolist() == [0, *(1 + i for i in want)]
    assert tr.PruneSID(keep=6, score="component").plan(visual(ORIGINS["square"])).k == 6


def test_the_form_without_class_token_is_in_order_above_150():
    x = groups(180, 24, 0)[None]
    assert tr.PruneSID(keep=151).plan(tr.Evidence(x)).keep[0].diff().min() > 0
    long = tr.PruneSID(keep=150).plan(tr.Evidence(x)).keep[0]
    assert long.diff().min() < 0


def test_equal_tokens_tie_to_the_lower_index():
    plan = tr.PruneSID(keep=3).plan(tr.Evidence(torch.ones(1, 8, 6)))
    assert len(set(plan.keep[0].tolist())) == 3
    rows = torch.full((1, 1, 1, 9), 1 / 9)
    plan = tr.PruneSID(keep=3).plan(tr.Evidence(noise(1, 1, 6).expand(1, 9, 6), attention=rows, protected=1))
    assert plan.keep.tolist() == [[0, 1, 2]]


def test_samples_of_unequal_length():
    x, valid = groups(20, 16, 0)[None].repeat(2, 1, 1), torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    plan = tr.PruneSID(keep=7).plan(tr.Evidence(x, valid=valid))
    assert plan.keep[1].tolist() == sorted(6 + i for i in reference(x[1, 6:], 7))


def test_bad_settings():
    with pytest.raises(ValueError, match="order"):
        tr.PruneSID(order="rank")
    with pytest.raises(ValueError, match="score"):
        tr.PruneSID(score="received")
