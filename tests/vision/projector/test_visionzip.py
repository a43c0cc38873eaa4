"""VisionZip against the steps of its card, sample by sample in plain loops."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, class_row, noise, received, visual

import tokenreduce as tr
from tokenreduce.core.plan import Pool, Prune
from tokenreduce.vision.projector.visionzip import VisionZip


def steps(score, metric, dominant, contextual, own=True):
    """Steps 3 to 6 of the card on one image of N patches, in float64: ``(dominant patches, targets, members)``."""
    n = len(score)
    k = dominant - own
    best = sorted(range(n), key=lambda j: (-float(score[j]), j))[:k]
    rest = [j for j in range(n) if j not in best]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    unit = [m / max(float(m.norm()), 1e-12) for m in metric.double()]
    members = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            members[max(targets, key=lambda t: (float(unit[j] @ unit[t]), -t))].append(j)
    return sorted(best), targets, members


def outputs(x, score, metric, dominant, contextual):
    """Step 7 on one image (N+1,C), class token first: (K,C)."""
    best, targets, members = steps(score, metric, dominant, contextual)
    h = x.double()
    rows = [h[0], *[h[1 + j] for j in best]]
    for t in targets:
        mine = [h[1 + j] for j in members[t]]
        rows.append(h[1 + t] + sum(mine) / len(mine) if mine else h[1 + t])
    return torch.stack(rows)


def class_attention(q, k):
    """(N,) of queries and keys (H,N+1,d): softmax in every head, summed over heads, class column dropped after it."""
    q, k = q.double(), k.double()
    return sum((q[h, 0] @ k[h].T / q.shape[-1] ** 0.5).softmax(0)[1:] for h in range(len(q)))


def clip(n, batch=2, seed=0, heads=3, dim=4):
    """Features, queries and keys of a tower with class token on ``n`` patches."""
    x, q, k = noise(batch, n + 1, 6, seed=seed), *(noise(batch, heads, n + 1, dim, seed=seed + s) for s in (1, 2))
    return x, q, k


@pytest.mark.parametrize("n", [2, 3, 5, 16, 33, 100])
@pytest.mark.parametrize(("dominant", "contextual"), [(1, 1), (2, 1), (3, 2), (2, 9), (9, 6), (54, 10), (40, 50)])
def test_is_the_card(n, dominant, contextual):
    x, q, k = clip(n, seed=n)
    plan = VisionZip(dominant=dominant, contextual=contextual).plan(tr.Evidence(x, k, q, protected=1))
    if dominant + contextual >= n:
        assert plan.is_identity
        return
    assert isinstance(plan, Pool)
    assert not plan.normalised
    assert plan.k == dominant + contextual
    for b in range(2):
        score, metric = class_attention(q[b], k[b]), k[b].mean(0)[1:]
        best, targets, members = steps(score, metric, dominant, contextual)
        assert plan.representatives()[b].tolist() == [0, *[1 + j for j in best], *[1 + t for t in targets]]
        alone = [True] * dominant + [not members[t] for t in targets]
        assert plan.untouched()[b].tolist() == alone
        want = outputs(x[b], score, metric, dominant, contextual)
        torch.testing.assert_close(plan.reduce(x)[b].double(), want, atol=1e-5, rtol=1e-5)
        one = VisionZip(dominant=dominant, contextual=contextual).plan(
            tr.Evidence(x[b : b + 1], k[b : b + 1], q[b : b + 1], protected=1)
        )
        assert torch.equal(one.weights[0], plan.weights[b])


def example():
    """Seven patches; attention ranks 3, then 5; the rest is 0 1 2 4 6, with keys along two axes."""
    attention = torch.tensor([0.3, 0.05, 0.06, 0.07, 0.2, 0.01, 0.25, 0.06])[None, None, None]
    keys = torch.tensor([[9, 9], [1, 0], [5, 1], [0, 1], [1, 1], [0.1, 2], [1, 1], [3, 1.0]])[None, None]
    x = torch.tensor([100.0, 1, 2, 4, 8, 16, 32, 64])[None, :, None]
    return tr.Evidence(x, keys, attention=attention, protected=1), x


def test_worked_example():
    """M = 5, step 2: targets 0 and 2; patches 1 and 6 point along 0, patch 4 along 2."""
    e, x = example()
    plan = VisionZip(dominant=3, contextual=2).plan(e)
    assert plan.representatives().tolist() == [[0, 4, 6, 1, 3]]
    assert plan.reduce(x).flatten().tolist() == [100, 8, 32, 1 + (2 + 64) / 2, 4 + 16]
    assert plan.untouched().tolist() == [[True, True, True, False, False]]
    assert plan.sources().tolist() == [[0, 3, 3, 4, 1, 4, 2, 3]]


def test_a_contextual_token_is_a_sum_of_two_and_not_an_average():
    e, _ = example()
    weights = VisionZip(dominant=3, contextual=2).plan(e).weights[0]
    assert weights.sum(1).tolist() == [1, 1, 1, 2, 2]
    assert weights[3].tolist() == [0, 1, 0.5, 0, 0, 0, 0, 0.5]


def test_other_features_change_no_assignment():
    e, x = example()
    before = VisionZip(keep=5).plan(e)
    e.x = noise(*x.shape)
    assert VisionZip(keep=5).plan(e) == before


@pytest.mark.parametrize(
    ("keep", "parts"),
    [
        (64, (54, 10)),
        (128, (108, 20)),
        (192, (162, 30)),
        (32, (27, 5)),
        (1, (1, 0)),
        (3, (3, 0)),
        (4, (3, 1)),
        (16, (13, 3)),
    ],
)
def test_keep_splits_as_in_the_paper(keep, parts):
    assert VisionZip().split(keep) == parts
    x, q, k = clip(300, batch=1)
    plan = VisionZip(keep=keep).plan(tr.Evidence(x, k, q, protected=1))
    assert plan.k == keep
    own = class_attention(q[0], k[0])
    best = sorted(range(300), key=lambda j: -float(own[j]))[: parts[0] - 1]
    assert plan.representatives()[0, : parts[0]].tolist() == [0, *sorted(1 + j for j in best)]


def test_default_budget_and_ratio():
    x, q, k = clip(576, batch=1)
    e = tr.Evidence(x, k, q, protected=1)
    assert VisionZip().plan(e).k == 64
    assert VisionZip(keep=0.25).plan(e).k == 144
    assert VisionZip(keep=1000).plan(e).is_identity


def test_one_token_is_the_class_token():
    x, q, k = clip(9)
    plan = VisionZip(keep=1).plan(tr.Evidence(x, k, q, protected=1))
    assert plan == Prune(10, torch.tensor([[0], [0]]))


def test_without_contextual_tokens_it_is_a_prune():
    x, q, k = clip(20)
    plan = VisionZip(dominant=5, contextual=0).plan(tr.Evidence(x, k, q, protected=1))
    assert isinstance(plan, Prune)
    for b in range(2):
        best = sorted(range(20), key=lambda j: -float(class_attention(q[b], k[b])[j]))[:4]
        assert plan.keep[b].tolist() == [0, *sorted(1 + j for j in best)]


def test_class_token_left_out():
    """No token of a tower is it then, and all dominant tokens are patches; protected in plain evidence it is extra."""
    method = VisionZip(keep=8, keep_cls=False)
    assert not method.with_class()
    assert VisionZip().with_class()
    e = visual(batch=1).in_vision(method.with_class())
    assert e.prefix == 0
    plan = method.plan(e)
    best, targets, _ = steps(class_row(e), e.keys[0].mean(0), 7, 1, own=False)
    assert plan.representatives()[0].tolist() == [*best, *targets]
    x, q, k = clip(16)
    plan = method.plan(tr.Evidence(x, k, q, protected=1))
    assert plan.k == 9
    best, targets, _ = steps(class_attention(q[1], k[1]), k[1].mean(0)[1:], 7, 1, own=False)
    assert plan.representatives()[1].tolist() == [0, *[1 + j for j in best], *[1 + j for j in targets]]


def test_registers_are_not_counted():
    x, q, k = clip(16)
    plan = VisionZip(keep=6).plan(tr.Evidence(x, k, q, protected=3))
    assert plan.representatives()[0, :3].tolist() == [0, 1, 2]
    assert plan.k == 6 + 2, "the class token is one of the six"
    assert VisionZip(keep=6).plan(tr.Evidence(x, k, q, protected=3, cls=False)).k == 6 + 3


@pytest.mark.parametrize("layer", [None, 0, -1, 0.5])
def test_attention_and_keys_are_of_one_block(layer):
    method = VisionZip(keep=9, layer=layer)
    assert method.tower_blocks() == (layer,)
    e = visual(ORIGINS["large"]).in_vision(True)
    plan = method.plan(e)
    seen = e.tower(layer).patches
    for b in range(2):
        metric = seen.keys[b].mean(0)[1:]
        best, targets, _ = steps(class_row(e, layer, b), metric, 8, 1)
        assert plan.representatives()[b].tolist() == [0, *[1 + j for j in best], *[1 + j for j in targets]]
        want = outputs(e.x[b], class_row(e, layer, b), metric, 8, 1)
        torch.testing.assert_close(plan.reduce(e.x)[b].double(), want, atol=1e-5, rtol=1e-5)


def test_tower_without_class_token_ranks_by_attention_received():
    e = visual(ORIGINS["wide"], cls=False).in_vision(True)
    plan = VisionZip(keep=8).plan(e)
    best, targets, _ = steps(received(e), e.keys[0].mean(0), 7, 1, own=False)
    assert plan.representatives()[0].tolist() == [*best, *targets]
    with pytest.raises(ValueError, match="no class token"):
        VisionZip(keep=8, score="cls").plan(e)
    assert VisionZip(score="cls").required() == ("tower", "cls")


def test_tokens_of_four_patches_average_scores_and_keys():
    e = visual(ORIGINS["units"], cls=False).in_vision(True)
    plan = VisionZip(keep=8).plan(e)
    index = e.origin.index
    score = received(e)[index].mean(1)
    metric = e.tower().patches.keys[0].mean(0)[index].mean(1)
    best, targets, members = steps(score, metric, 7, 1, own=False)
    assert plan.representatives()[0].tolist() == [*best, *targets]
    merged = e.x[0, targets[0]] + e.x[0, members[targets[0]]].mean(0)
    torch.testing.assert_close(plan.reduce(e.x)[0, -1], merged)


def test_ties_go_to_the_lower_index():
    """Equal scores keep the first patches, and a key as similar to both targets joins the first."""
    x = noise(1, 10, 4)
    keys = torch.ones(1, 1, 10, 2)
    plan = VisionZip(dominant=3, contextual=2).plan(tr.Evidence(x, keys, torch.ones(1, 1, 10, 2), protected=1))
    assert plan.representatives().tolist() == [[0, 1, 2, 3, 6]]
    assert (plan.sources()[0, 3:] == torch.tensor([3, 3, 3, 4, 3, 3, 3])).all()


def test_zero_keys_are_no_nan():
    x, q, k = clip(12)
    k[0, :, 5:9] = 0
    e = tr.Evidence(x, k, q, protected=1)
    plan = VisionZip(dominant=3, contextual=3).plan(e)
    assert torch.isfinite(plan.weights).all()
    want = outputs(x[0], class_attention(q[0], k[0]), k[0].mean(0)[1:], 3, 3)
    torch.testing.assert_close(plan.reduce(x)[0].double(), want, atol=1e-5, rtol=1e-5)
    k[0, :, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        VisionZip(dominant=3, contextual=3).plan(tr.Evidence(x, k, q, protected=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_do_not_change_the_choice(dtype):
    x, q, k = (t.to(dtype) for t in clip(40))
    want = VisionZip(keep=12).plan(tr.Evidence(x, k.float(), q.float(), protected=1)).representatives()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = VisionZip(keep=12).plan(tr.Evidence(x, k, q, protected=1))
    assert torch.equal(plan.representatives(), want)
    assert plan.reduce(x).dtype == dtype


def test_views_share_explicit_counts_in_proportion():
    method = VisionZip(dominant=108, contextual=20)
    assert method.total(576) == 128
    assert method.total(100) == 100
    assert method.at(64) == VisionZip(dominant=54, contextual=10)
    assert VisionZip(dominant=2, contextual=9).at(1).split(1) == (1, 0), "a dominant token is left"
    x, q, k = clip(300)
    assert method.at(40).plan(tr.Evidence(x, k, q, protected=1)).k == 40
    assert VisionZip(keep=0.5).at(40) == VisionZip(keep=40)


def test_one_graph():
    method = VisionZip(keep=9)
    choice = torch.compile(
        lambda x, q, k: method.plan(tr.Evidence(x, k, q, protected=1)).weights, fullgraph=True, backend="eager"
    )
    x, q, k = clip(30)
    assert torch.equal(choice(x, q, k), method.plan(tr.Evidence(x, k, q, protected=1)).weights)


def test_a_mask_of_protected_tokens_is_refused():
    x, q, k = clip(12)
    ends = torch.zeros(2, 13, dtype=torch.bool)
    ends[:, 5] = True
    with pytest.raises(ValueError, match="visionzip merges"):
        VisionZip(keep=6).plan(tr.Evidence(x, k, q, torch.rand(2, 3, 1, 13), protected=ends, cls=False))


def test_settings():
    method = tr.get_method("visionzip:keep=128,keep_cls=false,layer=-3")
    assert method == VisionZip(keep=128, keep_cls=False, layer=-3)
    explicit = VisionZip(dominant=162, contextual=30)
    assert tr.get_method(explicit.spec()) == explicit
    assert tr.Reducer.from_json(explicit.to_json()) == explicit
    for bad, message in [
        ({"keep": 0}, "keep is a number of tokens"),
        ({"keep": 1.5}, "keep is a number of tokens"),
        ({"keep": None}, "keep is a number of tokens"),
        ({"dominant": 54}, "dominant and contextual are given together"),
        ({"contextual": 10}, "dominant and contextual are given together"),
        ({"dominant": 0, "contextual": 10}, "dominant is an int >= 1"),
        ({"dominant": 54, "contextual": -1}, "contextual is an int >= 0"),
        ({"dominant": 5.0, "contextual": 1}, "dominant is an int >= 1"),
        ({"keep_cls": 1}, "keep_cls is True or False"),
        ({"layer": "top"}, "layer is a 0-based block"),
        ({"score": "cosine"}, "score is one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            VisionZip(**bad)
