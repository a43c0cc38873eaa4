"""SCOPE against the steps of its card, candidate by candidate in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, class_row, noise, received, visual

import tokenreduce as tr


def greedy(a, f, keep, alpha=1.0, combination="product"):
    """The card's steps on one image: saliency a (N,), features f (N,C); float64. Indices as they are chosen."""
    n = len(a)
    u = [v / max(float(v.norm()), 1e-12) for v in f.double()]
    s = [[float(p @ q) for q in u] for p in u]
    covered, chosen = [0.0] * n, []
    while len(chosen) < keep:
        best = None
        for j in range(n):
            if j in chosen:
                continue
            gain = sum(max(0.0, s[i][j] - covered[i]) for i in range(n))
            gain = 0.0 if gain < 1e-5 else gain
            w = float(a[j]) ** alpha
            score = gain * w if combination == "product" else gain + w
            key = (score, float(a[j]), -j)
            best = max(best, (key, j)) if best is not None else (key, j)
        chosen.append(best[1])
        covered = [max(c, s[i][best[1]]) for i, c in enumerate(covered)]
    return chosen


@pytest.mark.parametrize("origin", ["square", "wide"])
@pytest.mark.parametrize("keep", [1, 2, 5, 13])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_is_the_greedy_choice_of_the_card(origin, keep, alpha):
    e = visual(ORIGINS[origin])
    method = tr.get_method(f"scope:keep={keep},alpha={alpha}")
    plan, order = method.plan(e), method.order(e)
    for b in range(2):
        want = greedy(class_row(e, b=b), e.features[b], keep, alpha)
        assert order[b].tolist() == want
        assert plan.keep[b].tolist() == sorted(want)
        alone = visual(ORIGINS[origin], rows=slice(b, b + 1))
        assert torch.equal(method.plan(alone).keep[0], plan.keep[b])


def test_the_sum_adds_attention_summed_over_heads():
    """Gains are 1.9, 1.9, 0 and 1: three heads lift the last token by 1.5 and the first by 0.3."""
    x = torch.tensor([[[1.0, 0], [0.9, 0.435889894], [0, 0], [0, -1]]])
    a = torch.tensor([0.1, 0.1, 0.3, 0.5]).expand(1, 3, 1, 4)
    method = tr.get_method("scope:keep=1,combination=sum")
    assert method.order(tr.Evidence(x, attention=a)).tolist() == [[3]]
    assert method.order(tr.Evidence(x, attention=a[:, :1])).tolist() == [[0]]
    for cls in (True, False):
        e = visual(ORIGINS["wide"], cls=cls)
        order = tr.get_method("scope:keep=6,combination=sum,alpha=2").order(e)
        for b in range(2):
            s = class_row(e, b=b) if cls else received(e, b=b)
            assert order[b].tolist() == greedy(s * 2, e.features[b], 6, 2.0, "sum")


@pytest.mark.parametrize("n", [2, 3, 17, 36])
def test_plain_evidence_behind_a_class_token(n):
    x, a = noise(2, n + 1, 6, seed=n), noise(2, 2, 1, n + 1, seed=1).softmax(-1)
    plan = tr.get_method("scope:keep=0.5").plan(tr.Evidence(x, attention=a, protected=1))
    for b in range(2):
        want = greedy(a[b].double().mean((0, 1))[1:], x[b, 1:], int(n * 0.5 + 0.5))
        assert plan.keep[b].tolist() == [0, *sorted(i + 1 for i in want)]


@pytest.mark.parametrize("dim", [3, 8, 64])
def test_once_everything_is_covered_the_salient_come(dim):
    """The card's case: 4 distinct tokens repeated 4 times. After one of each, the official code takes 0, 1, 2, 3 ...
    Lengths differ, so that cosines of 1 are rounded."""
    x = noise(1, 4, dim).repeat(1, 4, 1) * (noise(1, 16, 1, seed=5).abs() + 0.1)
    a = noise(1, 1, 1, 16, seed=2).softmax(-1)
    order = tr.get_method("scope:keep=10").order(tr.Evidence(x, attention=a))[0].tolist()
    salient = a[0, 0, 0].argsort(descending=True).tolist()
    assert {i % 4 for i in order[:4]} == {0, 1, 2, 3}
    for i in order[:4]:
        assert a[0, 0, 0, i] == a[0, 0, 0, i % 4 :: 4].max(), "of equal tokens the most salient"
    assert order[4:] == [i for i in salient if i not in order[:4]][:6]


def test_ties_go_to_saliency_then_to_the_lower_index():
    x = torch.eye(4)[None]
    flat = tr.Evidence(x, attention=torch.full((1, 1, 1, 4), 0.25))
    assert tr.get_method("scope:keep=3").order(flat).tolist() == [[0, 1, 2]]
    peak = tr.Evidence(x, attention=torch.tensor([[[[0.1, 0.2, 0.1, 0.6]]]]))
    assert tr.get_method("scope:keep=3,alpha=0").order(peak).tolist() == [[3, 1, 0]]


def test_negative_similarity_covers_nothing():
    """Opposite tokens: a signed sum would give both gain 0."""
    x = torch.tensor([[[1.0, 0], [-1, 0], [0, 1]]])
    e = tr.Evidence(x, attention=torch.tensor([[[[0.4, 0.35, 0.25]]]]))
    assert tr.get_method("scope:keep=2").order(e).tolist() == [[0, 1]]


def test_zero_vectors_and_nan():
    x, a = noise(1, 9, 4), noise(1, 1, 1, 9, seed=1).softmax(-1)
    x[0, [1, 4]] = 0
    order = tr.get_method("scope:keep=5").order(tr.Evidence(x, attention=a))[0].tolist()
    assert order == greedy(a[0, 0, 0], x[0], 5)
    assert not {1, 4} & set(order)
    x[0, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.get_method("scope:keep=5").plan(tr.Evidence(x, attention=a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype):
    x, a = noise(1, 40, 16).to(dtype), noise(1, 2, 1, 40, seed=1).softmax(-1)
    want = greedy(a[0, :, 0].double().mean(0), x[0].double(), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tr.get_method("scope:keep=20").order(tr.Evidence(x, attention=a))[0].tolist() == want


def test_towers_without_class_token_and_merged_patches():
    e = visual(ORIGINS["units"], cls=False)
    order = tr.get_method("scope:keep=7").order(e)
    for b in range(2):
        assert order[b].tolist() == greedy(received(e, b=b)[e.origin.index].mean(1), e.x[b], 7)


def test_evidence_is_left_as_it_was():
    e = visual(ORIGINS["square"])
    before = e.features.clone()
    tr.get_method("scope:keep=7").plan(e)
    assert torch.equal(e.features, before)


@pytest.mark.parametrize(
    ("bad", "name"),
    [("alpha=-1", "alpha"), ("alpha=true", "alpha"), ("alpha=inf", "alpha"), ("combination=max", "combination")],
)
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name):
        tr.get_method(f"scope:{bad}")
