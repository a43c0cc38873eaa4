"""MMTok against the steps of its card, share by share in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, noise, visual

import tokenreduce as tr
from tokenreduce.core.evidence import Evidence, ImageEvidence
from tokenreduce.core.registry import get_class

MMTok = get_class("mmtok", "projector")


def direction(row):
    return row.double() / max(float(row.double().norm()), 1e-8)


def softmax(values):
    e = [math.exp(v - max(values)) for v in values]
    return [v / sum(e) for v in e]


def reference(x, features, words, keep, alpha=0.5, tau_tv=0.02, tau_vv=0.2):
    """Indices in the order in which the card's steps take them, for one view; ``words`` (m,D), m may be 0."""
    v, f, z = ([direction(r) for r in t] for t in (x, features, words))
    n, m = len(v), len(z)
    shares = [[p / m for p in softmax([float(w @ t) / tau_tv for t in v])] for w in z]
    shares += [[alpha * p / n for p in softmax([float(a @ b) / tau_vv for b in f])] for a in f]
    covered, chosen = [0.0] * len(shares), []
    for _ in range(keep):
        gains = [
            -math.inf if j in chosen else sum(max(0.0, row[j] - c) for row, c in zip(shares, covered, strict=True))
            for j in range(n)
        ]
        best = gains.index(max(gains))
        chosen.append(best)
        covered = [max(c, row[best]) for row, c in zip(shares, covered, strict=True)]
    return chosen


@pytest.mark.parametrize("origin", ["square", "wide", "units"])
@pytest.mark.parametrize("keep", [1, 2, 7, 15])
def test_is_the_greedy_coverage_of_the_card(origin, keep):
    e = visual(ORIGINS[origin], batch=3)
    order = MMTok(keep=keep).order(e)
    for b in range(3):
        want = reference(e.x[b], e.features[b], e.text[b][e.text_valid[b]], keep)
        assert order[b].tolist() == want
        assert MMTok(keep=keep).plan(e).keep[b].tolist() == sorted(want), "raster order"
    assert torch.equal(MMTok(keep=3).order(e), order[:, :3]) or keep < 3, "a prefix is the answer for a smaller keep"


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 3.0}, {"tau_tv": 0.5}, {"tau_vv": 0.01}])
def test_settings_count(settings):
    e = visual(ORIGINS["wide"], batch=1, seed=3)
    assert MMTok(keep=6, **settings).order(e)[0].tolist() == reference(
        e.x[0], e.features[0], e.text[0][e.text_valid[0]], 6, **settings
    )


@pytest.mark.parametrize("n", [2, 3, 5, 17])
def test_plain_evidence_and_awkward_lengths(n):
    x = noise(2, n, 6, seed=n)
    e = Evidence(x, text=noise(2, 4, 6, seed=1))
    for b in range(2):
        assert MMTok(keep=n - 1).order(e)[b].tolist() == reference(x[b], x[b], e.text[b], n - 1)
    behind = Evidence(torch.cat([noise(2, 1, 6, seed=9), x], 1), protected=1, text=e.text)
    plan = MMTok(keep=n - 1).plan(behind)
    for b in range(2):
        assert plan.keep[b].tolist() == [0, *sorted(1 + i for i in reference(x[b], x[b], e.text[b], n - 1))]


def test_worked_example():
    """Three equal tokens, two equal ones and one alone: the largest group is covered first, by one token, and so on."""
    a, b, c = torch.eye(3)
    x = torch.stack([c, a, a, a, b, b])[None]
    assert MMTok(keep=4, tau_vv=1.0).order(Evidence(x))[0].tolist() == [1, 4, 0, 2]
    # A word that is the single token turns the order round.
    assert MMTok(keep=2, tau_vv=1.0).order(Evidence(x, text=c[None, None]))[0].tolist() == [0, 1]
    # With alpha=0 the word alone is covered, and what adds nothing is taken from the front, once.
    assert MMTok(keep=3, alpha=0.0).order(Evidence(x, text=c[None, None]))[0, 0] == 0


def test_without_words_the_image_is_covered():
    e = visual(ORIGINS["wide"], batch=2)
    want = [reference(e.x[b], e.features[b], e.x[b][:0], 5) for b in range(2)]
    e.text_valid[1] = False
    assert MMTok(keep=5).order(e)[1].tolist() == want[1], "a sample without a word"
    assert MMTok(keep=5).order(e)[0].tolist() != want[0]
    e.text = None
    assert MMTok(keep=5).order(e).tolist() == want


def test_words_that_are_not_there_do_not_count():
    e = visual(ORIGINS["square"], batch=2)
    before = MMTok(keep=6).order(e)
    e.text[~e.text_valid] = float("nan")
    assert torch.equal(MMTok(keep=6).order(e), before)


def test_one_vector_of_text_is_one_word():
    x, text = noise(2, 9, 6), noise(2, 6, seed=1)
    one = MMTok(keep=4).order(Evidence(x, text=text))
    assert torch.equal(one, MMTok(keep=4).order(Evidence(x, text=text[:, None])))


def test_text_of_another_space_is_an_error():
    with pytest.raises(ValueError, match=r"space of the visual embeddings .*, not \(2, 4, 5\)"):
        MMTok(keep=4).plan(Evidence(noise(2, 9, 6), text=noise(2, 4, 5)))


def test_duplicates_are_taken_once_and_ties_go_to_the_lower_index():
    x = noise(1, 3, 8).repeat(1, 5, 1)
    order = MMTok(keep=12).order(Evidence(x))[0].tolist()
    assert len(set(order)) == 12
    assert {i % 3 for i in order[:3]} == {0, 1, 2}
    assert MMTok(keep=4).order(Evidence(torch.ones(1, 7, 3)))[0].tolist() == [0, 1, 2, 3]
    assert MMTok(keep=4).order(Evidence(torch.zeros(1, 7, 3)))[0].tolist() == [0, 1, 2, 3]


def test_features_before_the_projector_are_those_that_are_covered():
    e = visual(ORIGINS["square"], batch=1)
    other = ImageEvidence(e.x, e.origin, features=noise(1, 16, 16, seed=77), text=e.text, text_valid=e.text_valid)
    assert MMTok(keep=6).order(other)[0].tolist() == reference(e.x[0], other.features[0], e.text[0][e.text_valid[0]], 6)
    assert MMTok(keep=6).order(other).tolist() != MMTok(keep=6).order(e).tolist()


def test_gradients_and_inputs_are_left_alone():
    x = noise(1, 9, 6).requires_grad_()
    copy = x.detach().clone()
    out = MMTok(keep=4).plan(Evidence(x, text=noise(1, 2, 6, seed=1))).reduce(x)
    out.sum().backward()
    assert torch.equal(x, copy)
    assert x.grad.sum() == 4 * 6


def test_settings():
    method = tr.get_method("mmtok:keep=32,alpha=1.0,tau_tv=0.01,tau_vv=0.1")
    assert method == MMTok(keep=32, alpha=1.0, tau_tv=0.01, tau_vv=0.1)
    assert (MMTok().keep, MMTok().alpha, MMTok().tau_tv, MMTok().tau_vv) == (64, 0.5, 0.02, 0.2)
    assert MMTok().required() == ("text",)
    for bad in ({"alpha": -1}, {"alpha": "much"}, {"tau_tv": 0}, {"tau_vv": -0.2}, {"tau_tv": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MMTok(**bad)
