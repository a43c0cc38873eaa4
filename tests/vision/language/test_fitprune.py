"""FitPrune against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, maps, mixed
from vlms import VLMS, prompts

import tokenreduce as tr

SCHEME = (14, 33, 89, 36, 36, 20, 55, 21)


def reference(evidence, layouts, b, left):
    row = layouts[b]
    places = [i for i, c in enumerate(row) if c == "v"]
    text = [i for i, c in enumerate(row) if c == "t" and places and i > places[-1]]
    m = maps(evidence, b).amax(0)
    score = {}
    for j in places:
        own = sum(float(m[i, j]) for i in places) / len(places)
        score[j] = own * (sum(float(m[i, j]) for i in text) if text else 1.0)
    best = sorted(places, key=lambda j: (-score[j], j))[:left]
    return [i for i, c in enumerate(row) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vtvvtvvt", "tvvvvvvv")], ids=str)
@pytest.mark.parametrize("keep", [1, 3, 0.5])
def test_is_the_choice_of_the_card(layouts, keep):
    evidence = mixed(layouts, layer=3)
    plan = tr.FitPrune(keep=keep).plan(evidence)
    for b, row in enumerate(layouts):
        n = row.count("v")
        left = min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5))
        assert kept_of(plan, b) == reference(evidence, layouts, b, left)


def test_given_rows_are_taken_as_they_are():
    evidence = mixed(LAYOUTS, layer=3)
    rows = torch.stack([maps(evidence, b) for b in range(2)]).float()
    given = mixed(LAYOUTS, layer=3, attention=rows)
    assert tr.FitPrune(keep=4).plan(given) == tr.FitPrune(keep=4).plan(evidence)
    with pytest.raises(ValueError, match="attention of all 16 rows"):
        tr.FitPrune(keep=4).plan(mixed(LAYOUTS, layer=3, attention=rows[:, :, :3]))


def test_an_official_scheme_is_exact_on_its_own_model():
    method = tr.FitPrune(deletes=SCHEME, tokens=576)
    left = 576
    for layer in range(1, 8):
        assert method.acts_at(layer, 8)
        row = "t" + "v" * left + "t"
        plan = method.plan(mixed((row,), layer=layer, depth=8, prompt=("t" + "v" * 576 + "t",)))
        left -= SCHEME[layer - 1]
        assert plan.k == left + 2
    assert not method.acts_at(0, 8)
    still = tr.FitPrune(deletes=(5, 0, 3), tokens=9)
    assert [still.acts_at(i, 3) for i in range(3)] == [False, True, False]


def test_an_official_scheme_on_other_numbers_of_tokens_and_layers():
    method = tr.FitPrune(deletes=(4, 0, 8, 0), tokens=16)
    evidence = mixed(("t" + "v" * 8 + "t",), layer=3, depth=4)
    assert method.plan(evidence).k == 8 - 6 + 2, "12 of 16 are gone before layer 3"
    assert [method.acts_at(i, 8) for i in range(8)] == [False, True, True, False, False, True, True, False]
    assert method.plan(mixed(("t" + "v" * 16 + "t",), layer=1, depth=8)).k == 16 - 2 + 2


def test_ties_and_where_it_acts():
    evidence = mixed(("vvvvtt",), layer=3)
    evidence.keys.zero_()
    evidence.queries.zero_()
    score = tr.FitPrune().score(evidence)[0, :4]
    assert kept_of(tr.FitPrune(keep=2).plan(evidence), 0) == [0, 1, 4, 5]
    assert score[0] > score[3], "earlier tokens are seen by more rows"
    assert not any(tr.FitPrune(keep=1.0).acts_at(i, 4) for i in range(4))


@pytest.mark.parametrize(
    "bad", [{"deletes": ()}, {"deletes": (3, -1)}, {"deletes": (300, 300)}, {"deletes": (3,), "keep": 5}, {"tokens": 0}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"deletes|tokens"):
        tr.FitPrune(**bad)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_padded_batch_generates_what_its_rows_do(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(model, tr.FitPrune(keep=4)):
        both = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            one = {
                k: v[b : b + 1, real] if v.shape == inputs["input_ids"].shape else v.chunk(2)[b]
                for k, v in inputs.items()
            }
            assert torch.equal(model.generate(**one, max_new_tokens=4, do_sample=False)[0, -4:], both[b, -4:])
