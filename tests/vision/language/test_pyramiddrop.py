"""PyramidDrop against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by

import tokenreduce as tr
from tokenreduce.algorithms.sequence import shrink
from tokenreduce.core.budget import geometric
from tokenreduce.vision.language.pyramiddrop import PyramidDrop


def reference(evidence, layouts, b, wanted):
    places = [i for i, c in enumerate(layouts[b]) if c == "v"]
    score = seen_by(evidence, b, last_of(layouts[b]))
    best = sorted(places, key=lambda i: (-float(score[i]), i))[:wanted]
    return [i for i, c in enumerate(layouts[b]) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize(("layer", "share"), [(1, 0.5), (2, 0.25), (3, 0.125)])
def test_worked_example(layouts, layer, share):
    evidence = mixed(layouts, layer=layer)
    plan = PyramidDrop().plan(evidence)
    for b, layout in enumerate(layouts):
        wanted = max(1, int(share * layout.count("v")))
        assert kept_of(plan, b) == reference(evidence, layouts, b, wanted)


def test_counts_are_of_the_entry_and_rounded_down():
    """21 visual tokens: 10, 5 and 2, whatever the stages before left."""
    prompt = ("t" + "v" * 21 + "tt",)
    for layer, present, want in ((1, 21, 10), (2, 10, 5), (3, 5, 2), (3, 9, 2)):
        layouts = ("t" + "v" * present + "tt",)
        plan = PyramidDrop().plan(mixed(layouts, layer=layer, prompt=prompt))
        assert plan.k == want + 3
    seven = PyramidDrop(layer_list=(2,), image_token_ratio_list=(0.3,))
    assert seven.plan(mixed(("v" * 10 + "t",))).k == int(10 * 0.3) + 1
    assert seven.plan(mixed(("vvt",))).k == 2, "at least one stays"


def test_a_stage_that_has_few_enough_already():
    prompt = ("t" + "v" * 20 + "tt",)
    assert PyramidDrop().plan(mixed(("tvvtt",), layer=2, prompt=prompt)).is_identity


def test_published_boundaries():
    assert [i for i in range(32) if PyramidDrop().acts_at(i, 32)] == [8, 16, 24]
    assert [i for i in range(28) if PyramidDrop().acts_at(i, 28)] == [7, 14, 21]
    two = PyramidDrop(image_token_ratio_list=(0.5, 0.1))
    assert [i for i in range(12) if two.acts_at(i, 12)] == [4, 8]


def test_keep_reaches_its_number_by_equal_ratios():
    prompt = ("t" + "v" * 64 + "t",)
    for layer, want in ((1, 32), (2, 16), (3, 8)):
        assert PyramidDrop(keep=0.125).plan(mixed(prompt, layer=layer)).k == want + 2
        assert PyramidDrop(keep=8).plan(mixed(prompt, layer=layer)).k == want + 2
    uneven = ("tvvvvvvvvvt", "tvvvvvvttt.")
    plan = PyramidDrop(keep=0.5).plan(mixed(uneven, layer=3))
    assert [len(kept_of(plan, b)) for b in range(2)] == [5 + 2, 3 + 5]


def test_keep_follows_the_rule_of_budgets_in_every_sample():
    first = torch.arange(40).unsqueeze(1)
    for keep in (1, 7, 0.5, 0.111, 1.0):
        for step in range(3):
            want = [geometric(keep, n, step, 3) for n in range(1, 40)]
            assert shrink(keep, first, step, 3)[:, 0].tolist() == [0, *want]


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvt",))
    evidence.keys.zero_()
    assert PyramidDrop(layer_list=(2,), keep=2).plan(evidence).representatives().tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layer_list=(0, 2, 3)), "layer_list is an int >= 1"),
        (dict(layer_list=(2, 2, 3)), "ascending"),
        (dict(layer_list=3), "layer_list is a tuple"),
        (dict(layer_list=(2, 3)), "2 boundaries and image_token_ratio_list 3 shares"),
        (dict(image_token_ratio_list=(0.2, 0.5)), "do not increase"),
        (dict(image_token_ratio_list=(0.5, 0.0)), "shares in"),
        (dict(image_token_ratio_list=(0.5,), keep=3), "not both"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PyramidDrop(**settings)


def test_bad_depth():
    with pytest.raises(ValueError, match=r"layer_list=\(8, 16, 24\): the language model has layers 0 to 3"):
        PyramidDrop(layer_list=(8, 16, 24)).acts_at(0, 4)
    with pytest.raises(ValueError, match="4 stages need as many layers, not 3"):
        PyramidDrop().acts_at(0, 3)


def test_texts():
    reducer = tr.get_method("pyramiddrop:layer_list=[1,3],image_token_ratio_list=[0.5,0.2]")
    assert reducer == PyramidDrop(layer_list=[1, 3], image_token_ratio_list=[0.5, 0.2])
    assert tr.get_method(reducer.spec()) == reducer
