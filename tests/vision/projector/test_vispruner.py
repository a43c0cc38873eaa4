"""VisPruner against the steps of its card, one list at a time in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, class_row, noise, received, visual

import tokenreduce as tr


def card(s, f, keep, rho, r=8):
    """The card's steps on one image: attention s (N,), features f (N,C); float64. Sorted indices."""
    order = sorted(range(len(s)), key=lambda i: (-float(s[i]), i))
    important = int(keep * rho)
    out, rest, wanted = order[:important], order[important:], keep - important
    if not wanted:
        return sorted(out)
    u = [v / max(float(v.norm()), 1e-12) for v in f.double()]
    while len(rest) > wanted:
        a, b = rest[::2], rest[1::2]
        gone = min(r, len(rest) - wanted, len(a))
        closest = {i: max(float(u[i] @ u[j]) for j in b) for i in a}
        rest = sorted(a, key=lambda i: (-closest[i], a.index(i)))[gone:] + b
    return sorted(out + rest)


def rows(*values):
    """Plain evidence whose attention is given: (B,1,1,N)."""
    return torch.tensor(values)[:, None, None]


@pytest.mark.parametrize("origin", ["square", "wide", "large"])
@pytest.mark.parametrize(("keep", "rho"), [(1, 0.5), (2, 0.5), (5, 0.6), (8, 0.75), (9, 0.5), (13, 0.0), (14, 1.0)])
def test_is_the_card(origin, keep, rho):
    e = visual(ORIGINS[origin])
    plan = tr.get_method(f"vispruner:keep={keep},important_ratio={rho}").plan(e)
    for b in range(2):
        assert plan.keep[b].tolist() == card(class_row(e, b=b), e.features[b], keep, rho)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31, 36])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_every_length_and_budget_is_exact(n, rho, r):
    a, x = noise(2, 1, 1, n).softmax(-1), noise(2, n, 6, seed=n)
    for keep in range(1, n):
        plan = tr.get_method(f"vispruner:keep={keep},important_ratio={rho},r={r}").plan(tr.Evidence(x, attention=a))
        for b in range(2):
            assert plan.keep[b].tolist() == card(a[b, 0, 0], x[b], keep, rho, r)


@pytest.mark.parametrize(("n", "keep", "rho"), [(576, 66, 0.5), (36, 10, 0.6)])
def test_budgets_that_fail_or_fall_short_in_the_official_code(n, keep, rho):
    x, a = noise(1, n, 8), noise(1, 1, 1, n, seed=1).softmax(-1)
    plan = tr.get_method(f"vispruner:keep={keep},important_ratio={rho}").plan(tr.Evidence(x, attention=a))
    assert plan.k == keep
    assert plan.keep[0].unique().numel() == keep


def test_worked_example():
    """Token 0 is salient. Of the list 1 2 3 4, places (1, 3) face (2, 4): 1 equals 2 and goes, which leaves 3 2 4. Now
    (3, 4) face 2: 4 is closer and goes."""
    x = torch.tensor([[[1.0, 1], [1, 0], [5, 0], [0, 1], [3, 1]]])
    e = tr.Evidence(x, attention=rows([0.5, 0.2, 0.15, 0.1, 0.05]))
    assert tr.get_method("vispruner:keep=3,important_ratio=0.34,r=1").plan(e).keep.tolist() == [[0, 2, 3]]
    assert tr.get_method("vispruner:keep=4,important_ratio=0.25,r=1").plan(e).keep.tolist() == [[0, 2, 3, 4]]


def test_all_salient_is_fastervlm_and_reads_no_features():
    e = visual(ORIGINS["large"], features=torch.full((2, 144, 16), float("nan")))
    assert tr.get_method("vispruner:keep=20,important_ratio=1").plan(e) == tr.get_method("fastervlm:keep=20").plan(e)
    with pytest.raises(ValueError, match="NaN"):
        tr.get_method("vispruner:keep=20,important_ratio=0.5").plan(e)


def test_ties_keep_the_order_of_the_image():
    """Flat attention and orthogonal features: the list is 0..5, and the first even place goes in every round."""
    e = tr.Evidence(torch.eye(6)[None], attention=torch.full((1, 1, 1, 6), 1 / 6))
    assert tr.get_method("vispruner:keep=4,important_ratio=0,r=1").plan(e).keep.tolist() == [[1, 3, 4, 5]]


def test_zero_features_are_similar_to_nothing():
    x = noise(1, 12, 4)
    x[0, [2, 7]] = 0
    a = noise(1, 1, 1, 12, seed=3).softmax(-1)
    plan = tr.get_method("vispruner:keep=6").plan(tr.Evidence(x, attention=a))
    assert plan.keep[0].tolist() == card(a[0, 0, 0], x[0], 6, 0.5)


def test_class_token_in_front_and_features_before_the_projector():
    x, a = noise(2, 10, 6), noise(2, 3, 1, 10, seed=1).softmax(-1)
    plan = tr.get_method("vispruner:keep=4").plan(tr.Evidence(x, attention=a, protected=1))
    for b in range(2):
        want = [0, *(i + 1 for i in card(a[b].double().mean((0, 1))[1:], x[b, 1:], 4, 0.5))]
        assert plan.keep[b].tolist() == want
    e = visual(ORIGINS["large"])
    other = visual(ORIGINS["large"], x=noise(2, 144, 12, seed=9))
    assert tr.get_method("vispruner:keep=9").plan(e) == tr.get_method("vispruner:keep=9").plan(other)


def test_towers_without_class_token_and_merged_patches():
    e = visual(ORIGINS["units"], cls=False)
    plan = tr.get_method("vispruner:keep=7").plan(e)
    for b in range(2):
        s = received(e, b=b)[e.origin.index].mean(1)
        assert plan.keep[b].tolist() == card(s, e.x[b], 7, 0.5)


def test_other_block():
    e = visual(ORIGINS["square"])
    plan = tr.get_method("vispruner:keep=6,layer=0").plan(e)
    assert plan.keep[0].tolist() == card(class_row(e, 0), e.features[0], 6, 0.5)
    assert plan != tr.get_method("vispruner:keep=6").plan(e)


@pytest.mark.parametrize(
    ("bad", "name"),
    [("important_ratio=1.5", "important_ratio"), ("important_ratio=true", "important_ratio"), ("r=0", "r is"),
     ("important_ratio=-0.1", "important_ratio")],
)  # fmt: skip
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name):
        tr.get_method(f"vispruner:{bad}")
