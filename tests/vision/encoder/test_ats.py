"""ATS against the card, written down as loops over the patches of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.algorithms.scoring import received_by_head
from tokenreduce.core.plan import Identity
from tokenreduce.vision.encoder.ats import ATS

F64 = torch.float64


def significance(e, b, head_norm="concat"):
    """Step 2 of the card for sample ``b``, not normalised: a list over all tokens."""
    q, k, v = (t[b].to(F64) for t in (e.queries, e.keys, e.values))
    heads, n = q.shape[:2]
    there = e.valid[b] if e.valid is not None else torch.ones(n, dtype=torch.bool)
    bias = torch.where(there, 0.0, float("-inf"))
    maps = [torch.softmax(q[h] @ k[h].T / math.sqrt(q.shape[-1]) + bias, -1) for h in range(heads)]
    rows = [a[0] if e.cls else a[there].mean(0) for a in maps]
    if head_norm == "per_head":
        return [sum(float(rows[h][j] * v[h, j].norm()) for h in range(heads)) for j in range(n)]
    return [sum(float(rows[h][j]) for h in range(heads)) * float(v[:, j].flatten().norm()) for j in range(n)]


def survivors(scores, heights):
    """Steps 3 to 5 for the significances of the patches that are there: their indices by ascending significance."""
    n = len(scores)
    order = sorted(range(n), key=lambda j: (scores[j], j))
    if n == 1:
        return order
    total, curve = 0.0, []
    for j in order:
        total += scores[j]
        curve.append(total)
    curve = [(c - curve[0]) / (curve[-1] - curve[0]) for c in curve]
    start = min(c for c in curve if c > 0)
    points = [start + i * (1 - start) / (heights - 1) for i in range(heights)] if heights > 1 else [1.0]
    hit = {min(range(n), key=lambda i: (abs(y - curve[i]), i)) for y in points}
    return [order[i] for i in sorted(hit)]


def kept(plan, b):
    valid = plan.validity()
    row = plan.representatives()[b]
    return (row if valid is None else row[valid[b]]).tolist()


@pytest.mark.parametrize("head_norm", ["concat", "per_head"])
@pytest.mark.parametrize("limit", [None, 2, 3, 6, 40])
@pytest.mark.parametrize(("n", "prefix"), [(3, 1), (4, 0), (10, 1), (17, 1), (18, 2), (21, 5)])
def test_follows_the_card(n, prefix, limit, head_norm):
    e = evidence(n=n, prefix=prefix, batch=3, layer=0, depth=1)
    plan = ATS(layers=(0,), num_tokens=limit, head_norm=head_norm).plan(e)
    heights = n - prefix if limit is None else min(limit - 1, n - prefix)
    counts = []
    for b in range(3):
        scores = significance(e, b, head_norm)[prefix:]
        want = list(range(prefix)) + [prefix + j for j in survivors(scores, heights)]
        assert kept(plan, b) == want
        counts.append(len(want))
    assert plan.k == max(counts)
    assert (plan.validity() is None) == (len(set(counts)) == 1)
    assert max(counts) <= prefix + heights


def test_both_norms_choose_differently():
    e = evidence(n=37, layer=0, depth=1)
    plans = [ATS(layers=(0,), head_norm=norm).plan(e) for norm in ("concat", "per_head")]
    assert kept(plans[0], 0) != kept(plans[1], 0)


def test_heights_belong_to_the_entry_of_the_model():
    """Ten patches left of a hundred are looked up at a hundred heights, so that more of them stay."""
    few, many = (evidence(n=11, layer=0, depth=1, entry=entry) for entry in (11, 101))
    for e, heights in ((few, 10), (many, 100)):
        plan = ATS(layers=(0,)).plan(e)
        assert kept(plan, 0) == [0] + [1 + j for j in survivors(significance(e, 0)[1:], heights)]
    assert len(kept(ATS(layers=(0,)).plan(many), 0)) > len(kept(ATS(layers=(0,)).plan(few), 0))


def plan_for(scores, **settings):
    """A plan for given significances of the patches (values of norm 1 and the class token's attention)."""
    row = torch.tensor([[0.5, *scores]])[:, None, None]
    n = row.shape[-1]
    e = tr.Evidence(torch.zeros(1, n, 2), attention=row, values=torch.ones(1, 1, n, 1), protected=1, depth=1)
    return ATS(layers=(0,), **settings).plan(e)


def test_worked_by_hand():
    # Cumulated 1 3 7 15 of 15, from 0 to 1: 0, 1/7, 3/7, 1. Heights 1/7, 3/7, 5/7, 1: 5/7 is as near to 3/7 as to 1.
    assert kept(plan_for([4.0, 1, 8, 2]), 0) == [0, 4, 1, 3]
    # Three heights 1/7, 4/7, 1: the middle one is nearest to 3/7. Two: the ends. One: the top.
    assert kept(plan_for([4.0, 1, 8, 2], num_tokens=4), 0) == [0, 4, 1, 3]
    assert kept(plan_for([4.0, 1, 8, 2], num_tokens=3), 0) == [0, 4, 3]
    assert kept(plan_for([4.0, 1, 8, 2], num_tokens=2), 0) == [0, 3]


def test_degenerate_significances():
    assert kept(plan_for([1.0, 1, 1, 1, 1]), 0) == [0, 2, 3, 4, 5]  # equal: all but the first
    assert kept(plan_for([0.0, 0, 0, 0, 0]), 0) == [0, 2, 3, 4, 5]  # nothing to go by counts as equal
    assert kept(plan_for([0.0, 3, 0, 0, 0]), 0) == [0, 2]  # score 0 never stays
    assert kept(plan_for([0.0, 2, 0, 2, 1]), 0) == [0, 5, 2, 4]
    assert isinstance(plan_for([3.0]), Identity)  # a single patch stays


@pytest.mark.parametrize("there", [[9, 6], [2, 9], [1, 3], [4, 4]])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_padding_does_not_change_a_sample(there, prefix):
    n = 9 + prefix
    valid = torch.arange(n) < prefix + torch.tensor(there)[:, None]
    together = evidence(n=n, prefix=prefix, layer=0, depth=1, valid=valid)
    plan = ATS(layers=(0,)).plan(together)
    for b, count in enumerate(there):
        m = prefix + count
        alone = tr.Evidence(
            together.x[b : b + 1, :m], together.keys[b : b + 1, :, :m], together.queries[b : b + 1, :, :m],
            values=together.values[b : b + 1, :, :m], protected=prefix, cls=prefix > 0, entry=n, depth=1,
        )  # fmt: skip
        want = list(range(prefix)) + [prefix + j for j in survivors(significance(together, b)[prefix:m], 9)]
        assert kept(plan, b) == want
        assert kept(ATS(layers=(0,)).plan(alone), 0) == want


def test_attention_received_in_pieces():
    valid = torch.arange(10) < torch.tensor([[10], [7]])
    for e in (evidence(n=10, prefix=0), evidence(n=10, prefix=0, valid=valid)):
        whole, pieces = received_by_head(e.attention), received_by_head(e.attention, chunk=3)
        torch.testing.assert_close(whole, pieces)
        there = torch.ones(2, 10) if e.valid is None else e.valid.float()
        torch.testing.assert_close(whole.sum(-1), torch.ones(2, 3))
        torch.testing.assert_close(whole[1], (e.attention("all")[1] * there[1][:, None]).sum(1) / there[1].sum())


def test_padding_to_the_bound():
    """Uncut slots: one less than patches, since the least significant one never stays, or the limit."""
    e = evidence(n=17, layer=0, depth=1)
    for limit, bound in ((None, 16), (9, 9)):
        tight = ATS(layers=(0,), num_tokens=limit).plan(e)
        loose = ATS(layers=(0,), num_tokens=limit, drop_tokens=False).plan(e)
        assert tight.k <= loose.k == bound
        assert [kept(tight, b) for b in range(2)] == [kept(loose, b) for b in range(2)]
        assert (loose.sources() == tight.sources()).all()
    assert ATS(layers=(0,)).plan(e).k < 16


def test_where_it_acts():
    assert [i for i in range(12) if ATS().acts_at(i, 12)] == list(range(3, 12))
    assert [i for i in range(3) if ATS().acts_at(i, 3)] == [0, 1, 2]
    assert [i for i in range(6) if ATS(layers=[4, 1]).acts_at(i, 6)] == [1, 4]
    assert not any(ATS(keep=1.0).acts_at(i, 12) for i in range(12))


def test_keep_is_a_limit_per_layer():
    """64 patches to 8 in three layers: at most 32, 16, 8 stay; one number per layer says the same."""
    for layer, left in ((1, 32), (3, 16), (4, 8)):
        e = evidence(n=65, layer=layer)
        by_keep = ATS(layers=(1, 3, 4), keep=8).plan(e)
        assert by_keep == ATS(layers=(4, 3, 1), num_tokens=(33, 17, 9)).plan(e)
        assert kept(by_keep, 0) == [0] + [1 + j for j in survivors(significance(e, 0)[1:], left)]
    assert isinstance(ATS(layers=(1, 3, 4), keep=64).plan(evidence(n=65, layer=4)), Identity)


def test_in_a_model_a_sample_is_alone_in_any_batch():
    model, x = tr.patch(tiny_vit(), ATS(layers=(1, 2, 4), num_tokens=(20, None, 6))), images(3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_tokens": 1}, "num_tokens"),
        ({"num_tokens": 0.5}, "num_tokens"),
        ({"num_tokens": (9, 0)}, "num_tokens"),
        ({"num_tokens": 9, "keep": 0.5}, "num_tokens or keep"),
        ({"layers": ()}, "layers"),
        ({"layers": 3}, "layers"),
        ({"layers": (3, 3)}, "twice"),
        ({"head_norm": "max"}, "'concat' or 'per_head'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ATS(**settings)


def test_settings_that_a_model_refuses():
    with pytest.raises(ValueError, match="layers 0 to 5"):
        tr.patch(tiny_vit(), ATS(layers=(3, 6)))
    with pytest.raises(ValueError, match="lists 2 numbers for 5 layers"):
        tr.patch(tiny_vit(), ATS(num_tokens=(9, 8)))
