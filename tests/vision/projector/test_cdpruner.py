"""CDPruner against the determinantal point process that it approximates, and the steps of its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, noise, visual

import tokenreduce as tr
from tokenreduce.core.evidence import Evidence, ImageEvidence
from tokenreduce.core.registry import get_class

CDPruner = get_class("cdpruner", "projector")


def direction(row):
    return row.double() / max(float(row.double().norm()), 1e-12)


def quality(similarity, theta=None):
    """Step 3 of the card for one image, from similarities that already have their sign."""
    low, high = min(similarity), max(similarity)
    q = [1.0 if high == low else (s - low + 1e-6) / (high - low) for s in similarity]
    return q if theta is None else [math.exp(theta / (2 * (1 - theta)) * v) for v in q]


def language(x, words):
    """Mean cosine of each token to the words."""
    return [sum(float(direction(t) @ direction(w)) for w in words) / len(words) for t in x]


def joint(patches, text):
    """Minus the mean cosine of each patch to the segments."""
    return [-s for s in language(patches, text)]


def by_determinant(x, q, keep):
    """Greedy choice by what it is for: each token makes the determinant of the chosen kernel largest; float64."""
    rows = torch.stack([direction(r) for r in x])
    weight = torch.tensor(q, dtype=torch.float64)
    kernel = weight[:, None] * (rows @ rows.T) * weight
    chosen = []
    for _ in range(keep):
        values = []
        for j in range(len(q)):
            own = [*chosen, j]
            values.append(-1.0 if j in chosen else float(torch.linalg.det(kernel[own][:, own])))
        chosen.append(values.index(max(values)))
    return chosen


def card(x, q, keep):
    """Step 5 of the card in plain loops, float64."""
    rows = [direction(r) for r in x]
    n = len(q)
    kernel = [[q[i] * float(rows[i] @ rows[j]) * q[j] for j in range(n)] for i in range(n)]
    d, past, chosen = [w * w for w in q], [], []  # the cosine to itself is 1
    for _ in range(keep):
        best = d.index(max(d))
        e = [(kernel[best][j] - sum(c[best] * c[j] for c in past)) / math.sqrt(d[best]) for j in range(n)]
        past.append(e)
        d = [d[j] - e[j] ** 2 for j in range(n)]
        for j in [*chosen, best]:
            d[j] = -math.inf
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("keep", [1, 2, 4, 6])
@pytest.mark.parametrize("theta", [None, 0.5])
def test_is_the_greedy_map_of_the_process(keep, theta):
    e = visual(ORIGINS["square"], batch=3, seed=4)
    plan = CDPruner(keep=keep, theta=theta).plan(e)
    for b in range(3):
        q = quality(language(e.x[b], e.text[b][e.text_valid[b]]), theta)
        assert plan.keep[b].tolist() == sorted(by_determinant(e.x[b], q, keep)) == sorted(card(e.x[b], q, keep))


@pytest.mark.parametrize("keep", [1, 5, 9])
def test_with_a_clip_model_the_sign_is_minus(keep):
    e = visual(ORIGINS["wide"], batch=2, seed=2)
    plan = CDPruner(keep=keep, clip="some/clip").plan(e)
    turned = CDPruner(keep=keep, clip="some/clip", sign=1).plan(e)
    for b in range(2):
        patches, text = e.clip[0][b], e.clip[1][b]
        assert plan.keep[b].tolist() == sorted(card(e.x[b], quality(joint(patches, text)), keep))
        assert turned.keep[b].tolist() == sorted(card(e.x[b], quality(language(patches, text)), keep))
    assert CDPruner(keep=keep, clip="some/clip", sign=-1).plan(e) == plan
    assert CDPruner(clip="some/clip").required() == ("clip",)
    assert CDPruner().required() == ("text",)


def test_the_sign_on_a_known_image():
    """All tokens differ alike, so that relevance alone decides: patch 2 is the text, patch 5 its opposite."""
    x = torch.eye(6)[None]
    patches = torch.zeros(1, 6, 2)
    patches[..., 1] = 1
    patches[0, 2], patches[0, 5] = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    e = ImageEvidence(x, ORIGINS["square"], text=x[:, 2:3], clip=(patches, torch.tensor([[[3.0, 0.0]]])))
    e.origin = e.origin.take(torch.arange(6))
    assert CDPruner(keep=1, clip="a/b").plan(e).keep.tolist() == [[5]]
    assert CDPruner(keep=1, clip="a/b", sign=1).plan(e).keep.tolist() == [[2]]
    assert CDPruner(keep=1).plan(e).keep.tolist() == [[2]], "not negated in the language model's space"


def test_segments_of_a_question_are_averaged_and_those_that_are_not_there_do_not_count():
    e = visual(ORIGINS["square"], batch=2, seed=5)
    segments = noise(2, 3, 6, seed=8)
    segments[1, 1:] = 0
    e._clip = (e.clip[0], segments)
    plan = CDPruner(keep=5, clip="a/b").plan(e)
    assert plan.keep[0].tolist() == sorted(card(e.x[0], quality(joint(e.clip[0][0], segments[0])), 5))
    assert plan.keep[1].tolist() == sorted(card(e.x[1], quality(joint(e.clip[0][1], segments[1, :1])), 5))
    method = CDPruner(keep=5, clip="a/b")
    alone = method.quality(e)[1]
    e._clip = (e.clip[0][1:], segments[1:, :1])
    e.x = e.x[1:]
    torch.testing.assert_close(method.quality(e)[0], alone)


def test_without_words_it_is_a_pure_process():
    e = visual(ORIGINS["wide"], batch=2)
    want = [sorted(card(e.x[b], [1.0] * 21, 6)) for b in range(2)]
    e.text_valid[1] = False
    assert CDPruner(keep=6).plan(e).keep[1].tolist() == want[1]
    assert CDPruner(keep=6).plan(e).keep[0].tolist() != want[0]
    e.text = None
    assert CDPruner(keep=6).plan(e).keep.tolist() == want
    e._clip = (e.clip[0], torch.zeros_like(e.clip[1]))
    assert CDPruner(keep=6, clip="a/b").plan(e).keep.tolist() == want


def test_constant_relevance_is_one():
    e = Evidence(noise(1, 8, 5), text=torch.zeros(1, 2, 5))
    assert CDPruner().quality(e).tolist() == [[1.0] * 8]


def test_beyond_the_rank_the_most_relevant_are_left():
    """30 of 40 tokens in 5 dimensions: 5 span all; officially 11 came out."""
    x, word = noise(2, 40, 5, seed=3), noise(2, 1, 5, seed=4)
    e = Evidence(x, text=word)
    plan = CDPruner(keep=30).plan(e)
    for b in range(2):
        q = quality(language(x[b], word[b]))
        first = card(x[b], q, 5)
        rest = sorted((j for j in range(40) if j not in first), key=lambda j: (-q[j], j))
        assert plan.keep[b].tolist() == sorted(first + rest[:25])


def test_duplicates_zeros_and_ties():
    x = noise(1, 4, 8).repeat(1, 4, 1)
    first = CDPruner(keep=4).plan(Evidence(x)).keep[0]
    assert first.tolist() == [0, 1, 2, 3]
    assert CDPruner(keep=11).plan(Evidence(x)).keep[0].tolist() == list(range(11)), "each once, then from the front"
    assert CDPruner(keep=3).plan(Evidence(torch.zeros(1, 7, 4))).keep.tolist() == [[0, 1, 2]]
    assert CDPruner(keep=2).plan(Evidence(torch.eye(5)[None])).keep.tolist() == [[0, 1]]
    mixed = torch.eye(5)[None].clone()
    mixed[0, 0] = 0
    assert CDPruner(keep=4).plan(Evidence(mixed)).keep.tolist() == [[1, 2, 3, 4]], "an empty token adds nothing"


def test_the_least_relevant_can_still_be_taken():
    """Its kernel entry is 1e-12: orthogonal to all others it adds more than copies of what is there."""
    x = torch.tensor([[[1.0, 0, 0]] * 4 + [[0, 1.0, 0]]])
    e = Evidence(x, text=torch.tensor([[[1.0, 0, 0]]]))
    assert CDPruner(keep=2).plan(e).keep.tolist() == [[0, 4]]


@pytest.mark.parametrize("n", [2, 3, 5, 33])
def test_plain_evidence_and_awkward_lengths(n):
    x, keep = noise(2, n, 40, seed=n), n - 1
    e = Evidence(x, text=noise(2, 3, 40, seed=1))
    want = [sorted(card(x[b], quality(language(x[b], e.text[b])), keep)) for b in range(2)]
    assert CDPruner(keep=keep).plan(e).keep.tolist() == want
    behind = Evidence(torch.cat([noise(2, 1, 40, seed=9), x], 1), protected=1, text=e.text)
    assert CDPruner(keep=keep).plan(behind).keep.tolist() == [[0, *(i + 1 for i in w)] for w in want]


@pytest.mark.parametrize("origin", ["anyres", "crops", "frames"])
def test_views_share_the_scale_of_relevance_and_the_budget(origin):
    e = visual(ORIGINS[origin], batch=2)
    where = (e.view >= 0).nonzero().flatten()
    o = e.origin.take(where)
    e = ImageEvidence(e.x[:, where], o, text=e.text, text_valid=e.text_valid)
    keep = 11
    plan = CDPruner(keep=keep).plan(e)
    for b in range(2):
        q = quality(language(e.x[b], e.text[b][e.text_valid[b]]))
        want, views = [], o.views
        for v in range(views):
            mine = [i for i in range(e.n) if int(o.view[i]) == v]
            count = keep // views + (v < keep % views)
            want += [mine[i] for i in card(e.x[b, mine], [q[i] for i in mine], count)]
        assert plan.keep[b].tolist() == sorted(want)


def test_a_budget_below_the_number_of_views():
    e = visual(ORIGINS["frames"], batch=1)
    plan = CDPruner(keep=2).plan(e)
    assert plan.k == 2
    assert e.view[plan.keep[0]].tolist() == [0, 1]


def test_half_precision_and_autocast_do_not_change_the_choice():
    x, text = noise(1, 40, 32).bfloat16(), noise(1, 3, 32, seed=1).bfloat16()
    want = CDPruner(keep=12).plan(Evidence(x.float(), text=text.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CDPruner(keep=12).plan(Evidence(x, text=text)) == want


def test_settings():
    method = tr.get_method("cdpruner:keep=128,clip=openai/clip-vit-large-patch14-336,sign=1,theta=0.5")
    assert method == CDPruner(keep=128, clip="openai/clip-vit-large-patch14-336", sign=1, theta=0.5)
    assert tr.get_method(method.spec()) == method
    for bad in ({"clip": ""}, {"clip": 3}, {"sign": 0}, {"sign": True}, {"theta": 1.0}, {"theta": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CDPruner(**bad)
    with pytest.raises(ValueError, match="name a CLIP model in its setting clip"):
        CDPruner(keep=2, clip="a/b").plan(Evidence(noise(1, 5, 4)))
