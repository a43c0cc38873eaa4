"""TRIM against the steps of its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, noise, visual

import tokenreduce as tr
from tokenreduce.core.evidence import Evidence, Joint
from tokenreduce.core.registry import get_class

TRIM = get_class("trim", "projector")


def seen(origin="square", **more):
    return visual(ORIGINS[origin], **more).in_vision(False)


def weights(patches, text, sign=-1):
    """Steps 3 of the card: softmax of the (negated) dot products with the first segment."""
    s = [sign * float(p.double() @ text[0].double()) for p in patches]
    e = [math.exp(v - max(s)) for v in s]
    return [v / sum(e) for v in e]


def language(x, words):
    """Our port: softmax of the mean cosine to the words."""
    s = [sum(float(torch.cosine_similarity(t.double(), w.double(), 0)) for w in words) / len(words) for t in x]
    e = [math.exp(v - max(s)) for v in s]
    return [v / sum(e) for v in e]


def best(w, k):
    return sorted(sorted(range(len(w)), key=lambda i: (-w[i], i))[:k])


def quartile(values, share):
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def outliers(w, factor=1.5):
    q1, q3 = quartile(w, 0.25), quartile(w, 0.75)
    return [i for i, v in enumerate(w) if v > q3 + factor * (q3 - q1)]


def outputs(features, stay):
    """Step 5: what stays in raster order, and the plain mean of the others behind them."""
    rest = [i for i in range(len(features)) if i not in stay]
    return torch.stack([*features[stay], features[rest].double().mean(0).to(features.dtype)])


@pytest.mark.parametrize("origin", ["square", "wide"])
@pytest.mark.parametrize("keep", [1, 2, 5, 15])
@pytest.mark.parametrize("sign", [None, -1, 1])
def test_keeps_the_lowest_similarity_and_the_mean_of_the_rest(origin, keep, sign):
    e = seen(origin, batch=3)
    method = TRIM(keep=keep, clip="some/clip", sign=sign)
    plan = method.plan(e)
    assert plan.k == keep
    for b in range(3):
        w = weights(e.clip[0][b], e.clip[1][b], sign or -1)
        stay = best(w, keep - 1)
        assert plan.representatives()[b, :-1].tolist() == stay
        torch.testing.assert_close(plan.reduce(e.x)[b], outputs(e.x[b], stay))
        host = int(plan.representatives()[b, -1])
        assert host not in stay, "the mean stands where a dropped token stood"
        assert host == max(i for i in range(e.n) if i not in stay)
    assert plan.untouched().tolist() == [[True] * (keep - 1) + [False]] * 3
    assert torch.equal(plan.reduce(e.x)[:, :-1], plan.gather(e.x)[:, :-1])


@pytest.mark.parametrize("keep", [2, 6])
def test_without_a_clip_model_the_language_model_space_is_asked(keep):
    e = visual(ORIGINS["wide"], batch=2)
    plan = TRIM(keep=keep).plan(e.in_vision(False))
    for b in range(2):
        w = language(e.x[b], e.text[b][e.text_valid[b]])
        assert plan.representatives()[b, :-1].tolist() == best(w, keep - 1), "embeddings, not features; not negated"
    assert TRIM().required() == ("text",)
    assert TRIM(clip="a/b").required() == ("clip",)


def test_the_sign_on_a_known_image():
    patches = torch.zeros(1, 16, 6)
    patches[0, 3, 0], patches[0, 9, 0] = 2.0, -2.0
    e = seen(batch=1)
    e._clip = Joint(patches, torch.eye(6)[None, :1])
    assert TRIM(keep=2, clip="a/b").plan(e).representatives()[0, 0] == 9
    assert TRIM(keep=2, clip="a/b", sign=1).plan(e).representatives()[0, 0] == 3


def test_only_the_first_segment_is_read():
    e = seen(batch=2)
    want = TRIM(keep=5, clip="a/b").plan(e)
    e._clip = Joint(e.clip[0], torch.cat([e.clip[1], noise(2, 2, 6, seed=50)], 1))
    assert TRIM(keep=5, clip="a/b").plan(e) == want


def skewed(batch=3):
    """Logits with a few high ones in one sample, none in the next."""
    e = seen("large", batch=batch)
    s = noise(batch, e.n, seed=12) * 0.05
    s[0, [7, 90, 33]] = torch.tensor([3.0, 2.0, 2.5])
    s[1:2] = 0
    patches = torch.zeros(batch, e.n, 6)
    patches[..., 0] = -s
    text = torch.zeros(batch, 1, 6)
    text[..., 0] = 1
    e._clip = Joint(patches, text)
    return e


@pytest.mark.parametrize("factor", [1.5, 0.5, 0.0])
def test_the_outlier_rule_of_every_sample(factor):
    e = skewed()
    method = TRIM(keep=None, clip="a/b", iqr_factor=factor)
    plan = method.plan(e)
    there, numbers = plan.validity(), []
    out = plan.reduce(e.x)
    for b in range(3):
        stay = outliers(weights(e.clip[0][b], e.clip[1][b]), factor)
        numbers.append(len(stay))
        assert plan.representatives()[b][there[b]].tolist()[:-1] == stay
        torch.testing.assert_close(out[b][there[b]], outputs(e.x[b], stay))
        assert there[b, -1], "the last output is there in every sample"
        one = method.plan(e.batch_of(torch.tensor([b])))
        torch.testing.assert_close(one.reduce(e.x[b : b + 1])[0], out[b][there[b]])
    assert numbers[1] == 0, "nothing sticks out: the mean alone, where the official code fails"
    assert numbers[0] >= 3
    assert plan.k == max(numbers) + 1
    sources = plan.sources()
    assert (sources >= 0).all(), "every token is kept or in the mean"


def test_an_almost_one_hot_softmax():
    e = skewed(1)
    e._clip = Joint(e.clip[0] * 20, e.clip[1])
    plan = TRIM(keep=None, clip="a/b").plan(e)
    stay = outliers(weights(e.clip[0][0], e.clip[1][0]))
    assert plan.representatives()[0].tolist()[:-1] == stay
    assert plan.k < 40


def test_keep_counts_all_outputs():
    assert TRIM().plan(seen("large")).k == 30  # 21 % of 144
    assert TRIM(keep=0.5).plan(seen("wide")).k == 11
    assert TRIM(keep=1).plan(seen("wide")).k == 1
    assert TRIM(keep=1.0).plan(seen("wide")).is_identity, "officially an index error"


def test_the_mean_keeps_the_mass_of_sizes():
    e = seen(batch=2)
    sizes = TRIM(keep=4, clip="a/b").plan(e).reduce_size(None)
    torch.testing.assert_close(sizes, torch.tensor([[1.0, 1.0, 1.0, 13.0]] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_and_the_mean_is_near(dtype):
    e = seen("large", batch=1)
    x = (e.x + 3).to(dtype)
    out = TRIM(keep=4, clip="a/b").plan(e).reduce(x)
    assert out.dtype == dtype
    stay = TRIM(keep=4, clip="a/b").plan(e).representatives()[0, :-1].tolist()
    want = outputs(x[0].double(), stay)
    torch.testing.assert_close(out[0].double(), want, rtol=1e-2, atol=1e-2)


def test_without_words_tokens_are_evenly_spaced():
    e = visual(ORIGINS["square"], batch=2)
    e.text_valid[1] = False
    plan = TRIM(keep=5).plan(e.in_vision(False))
    assert plan.representatives()[1].tolist() == [2, 6, 10, 14, 15]
    assert plan.representatives()[0, :-1].tolist() == best(language(e.x[0], e.text[0][e.text_valid[0]]), 4)
    e.text = None
    assert TRIM(keep=5).plan(e.in_vision(False)).representatives().tolist() == [[2, 6, 10, 14, 15]] * 2
    assert TRIM(keep=1).plan(e.in_vision(False)).representatives().tolist() == [[15]] * 2
    assert TRIM(keep=None).plan(e.in_vision(False)).k == 1
    e._clip = Joint(e.clip[0], torch.zeros_like(e.clip[1]))
    assert TRIM(keep=4, clip="a/b").plan(e.in_vision(False)).representatives()[0].tolist() == [2, 8, 13, 15]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_plain_evidence_and_awkward_lengths(n):
    x, text = noise(2, n, 6, seed=n), noise(2, 3, 6, seed=1)
    for keep in range(1, n):
        plan = TRIM(keep=keep).plan(Evidence(x, text=text))
        behind = TRIM(keep=keep).plan(Evidence(torch.cat([noise(2, 1, 6, seed=9), x], 1), protected=1, text=text))
        for b in range(2):
            stay = best(language(x[b], text[b]), keep - 1)
            torch.testing.assert_close(plan.reduce(x)[b], outputs(x[b], stay))
            assert behind.representatives()[b, :-1].tolist() == [0, *(i + 1 for i in stay)]
            assert behind.matrix()[b, 0].tolist() == [1.0] + [0.0] * n, "the class token is in no mean"
    assert TRIM(keep=n).plan(Evidence(x, text=text)).is_identity
    alone = TRIM(keep=None).plan(Evidence(x[:, :1], text=text))
    assert torch.equal(alone.reduce(x[:, :1]), x[:, :1])


def test_ties_go_to_the_lower_index():
    e = seen(batch=1)
    e._clip = Joint(torch.ones(1, 16, 6), torch.ones(1, 1, 6))
    assert TRIM(keep=4, clip="a/b").plan(e).representatives()[0].tolist() == [0, 1, 2, 15]


def test_settings():
    method = tr.get_method("trim:keep=none,clip=openai/clip-vit-large-patch14-336,sign=1,iqr_factor=2.0")
    assert method == TRIM(keep=None, clip="openai/clip-vit-large-patch14-336", sign=1, iqr_factor=2.0)
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    for bad in ({"clip": ""}, {"sign": 2}, {"iqr_factor": -1}, {"iqr_factor": float("inf")}, {"iqr_factor": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TRIM(**bad)
