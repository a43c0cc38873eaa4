"""VScan inside the language model against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by

import tokenreduce as tr
from tokenreduce.vision.language.vscan_prune import VScanLLM


def reference(evidence, layouts, b, wanted):
    places = [i for i, c in enumerate(layouts[b]) if c == "v"]
    score = seen_by(evidence, b, last_of(layouts[b]))
    best = sorted(places, key=lambda i: (-float(score[i]), i))[:wanted]
    return [i for i, c in enumerate(layouts[b]) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT], ids=["left", "right"])
def test_worked_example(layouts):
    """10 and 9 visual tokens: a third each, and a count for all."""
    evidence = mixed(layouts, layer=2)
    for reducer, wanted in ((VScanLLM(), (3, 3)), (VScanLLM(keep=4), (4, 4)), (VScanLLM(counts=(0.55,)), (6, 5))):
        plan = reducer.plan(evidence)
        for b in range(2):
            assert kept_of(plan, b) == reference(evidence, layouts, b, wanted[b])


def test_published_layers():
    assert [i for i in range(32) if VScanLLM().acts_at(i, 32)] == [16]
    assert [i for i in range(28) if VScanLLM().acts_at(i, 28)] == [14]
    assert [i for i in range(2) if VScanLLM().acts_at(i, 2)] == [1]
    assert [i for i in range(32) if VScanLLM(layer_list=[8, 16]).acts_at(i, 32)] == [8, 16]
    assert "ahead" in VScanLLM().required(), "queries and keys are those of the layer that acts"


def test_a_third_of_96_is_the_published_32():
    evidence = mixed(("t" + "v" * 96 + "tt",))
    assert VScanLLM().plan(evidence).k == 32 + 3


def test_several_layers():
    """Shares in ``counts`` are of what reaches a layer; ``keep`` is of what entered."""
    entry = ("t" + "v" * 64 + "tt",)
    shares = VScanLLM(layer_list=(1, 2, 3), counts=(0.5, 0.5, 3))
    by_keep = VScanLLM(layer_list=(1, 2, 3), keep=0.125)
    for layer, present, want, want_keep in ((1, 64, 32, 32), (2, 32, 16, 16), (3, 16, 3, 8)):
        evidence = mixed(("t" + "v" * present + "tt",), layer=layer, prompt=entry)
        assert shares.plan(evidence).k == want + 3
        assert by_keep.plan(evidence).k == want_keep + 3
    few = mixed(("tvvtt",), layer=2, prompt=entry)
    assert shares.plan(few).k == 1 + 3
    assert by_keep.plan(few).is_identity, "two are fewer than the 16 that may stay"


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvt",))
    evidence.keys.zero_()
    assert VScanLLM(keep=2).plan(evidence).representatives().tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layer_list=(0, 2)), "layer_list is an int >= 1"),
        (dict(layer_list=(2, 2)), "ascending"),
        (dict(layer_list=2), "layer_list is a tuple"),
        (dict(keep=3, counts=(3,)), "not both"),
        (dict(counts=(0.5, 0.25)), "counts is a tuple with one number for each of 1 layers"),
        (dict(counts=0.5), "counts is a tuple with one number for each of 1 layers"),
        (dict(counts=(1.5,)), "counts is a number of tokens"),
        (dict(counts=(None,)), "counts holds numbers of tokens"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VScanLLM(**settings)


def test_bad_depth():
    with pytest.raises(ValueError, match=r"layer_list=\(16,\): the language model has layers 0 to 3"):
        VScanLLM(layer_list=(16,)).acts_at(0, 4)
    with pytest.raises(ValueError, match="one layer has no middle"):
        VScanLLM().acts_at(0, 1)


def test_texts():
    reducer = tr.get_method("vscan-llm:layer_list=[1,3],counts=[0.5,3]")
    assert reducer == VScanLLM(layer_list=[1, 3], counts=[0.5, 3])
    assert tr.get_method(reducer.spec()) == reducer
    assert [r.name for r in tr.parse("vscan:keep=96+vscan-llm:keep=32")] == ["vscan", "vscan-llm"]
