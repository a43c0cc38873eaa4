"""The searches of `vtw` and `fitprune` against plain loops over the unpatched model."""

from __future__ import annotations

import pytest
import torch
from vlms import IMAGE, batch, llava

import tokenreduce as tr
from tokenreduce.measure.scheme import _spare, delete_scheme
from tokenreduce.measure.withdrawal import withdrawal_layer


@pytest.fixture(scope="module")
def model():
    return llava()


def test_the_layer_of_withdrawal(model):
    inputs = [batch("left", ((9, 1), (5, 1))), batch("left", ((7, 1),))]
    layer, found = withdrawal_layer(model, inputs, eta=1e9, first=1)
    assert layer == 1
    assert len(found) == 3
    with torch.no_grad():
        for i, got in enumerate(found):
            want = []
            for one in inputs:
                full = model(**one).logits[:, -1].double().softmax(-1)
                with tr.patched(model, tr.VTW(layer=1 + i)):
                    less = model(**one).logits[:, -1].double().softmax(-1)
                want += (less * (less.log() - full.log())).sum(-1).tolist()
            assert got == pytest.approx(sum(want) / 3, rel=1e-3)
    between = sorted(found)[0]
    assert withdrawal_layer(model, inputs, eta=between + 1e-6, first=1)[0] == 1 + found.index(between)
    assert withdrawal_layer(model, inputs, eta=0.0, first=1)[0] == 4, "none: all layers keep them"
    with pytest.raises(ValueError, match="no batch"):
        withdrawal_layer(model, [], first=1)
    with pytest.raises(ValueError, match="first=4"):
        withdrawal_layer(model, inputs, first=4)


def test_what_may_go_leaves_the_share():
    score = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert _spare(score, 1.0, 0.35).tolist() == [False, True, False, False], "0.1 and 0.2 may go, less one"
    assert _spare(score, 1.0, 0.0).tolist() == [False] * 4
    assert _spare(score, 1.0, 1.0).tolist() == [False, True, True, True]
    assert _spare(score, 2.0, 0.3).tolist() == [False] * 4, "of the total of the full model"


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_scheme_saves_about_what_is_asked(model, ratio):
    inputs = [batch("left", ((4, 1), (4, 1))), batch("left", ((4, 1),))]
    scheme = delete_scheme(model, inputs, ratio=ratio)
    assert len(scheme) == 4
    assert all(d >= 0 for d in scheme)
    assert sum(scheme) < 16
    left = [16 - sum(scheme[:i]) for i in range(4)]
    spent = sum(4 + n for n in left) / 80
    assert spent <= 1 - ratio + 0.25
    with torch.no_grad(), tr.patched(model, tr.FitPrune(deletes=scheme, tokens=16)), tr.record(model, flops=False) as t:
        model(**inputs[0])
    assert t.tokens[-1] == 4 + left[3]
    assert int((inputs[0]["input_ids"] == IMAGE).sum()) == 32


def test_deletions_are_the_common_part_of_both_criteria(model):
    """The first layer, by maps of the unpatched model."""
    inputs = batch("left", ((5, 1),))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        a = model(**inputs, output_attentions=True).attentions[0][0].double().amax(0)
    model.set_attn_implementation("sdpa")
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    text = torch.arange(int(visual[-1]) + 1, a.shape[0])
    own, cross = a[visual][:, visual].sum(0), a[text][:, visual].sum(0) / len(text)
    from tokenreduce.measure import scheme

    now = scheme._pass(model, [inputs], scheme._Fit(None))
    torch.testing.assert_close(now.totals[0, 1][0].double(), own.sum()[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now.totals[0, 1][1].double(), cross.sum()[None], rtol=1e-4, atol=1e-4)
    done = scheme._pass(model, [inputs], scheme._Fit(0.6, now.totals))
    want = _spare(own, float(own.sum()), 0.6) & _spare(cross, float(cross.sum()), 0.6)
    assert done.counts[0] == [(16, int(want.sum()))]


@pytest.mark.parametrize("bad", [0.0, 1.0, 1])
def test_bad_ratios(model, bad):
    with pytest.raises(ValueError, match="ratio"):
        delete_scheme(model, [batch("left", ((5, 1),))], ratio=bad)
    with pytest.raises(ValueError, match="no batch"):
        delete_scheme(model, [])
