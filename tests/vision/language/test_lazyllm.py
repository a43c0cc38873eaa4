"""LazyLLM's rule against the steps of its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by

import tokenreduce as tr
from tokenreduce.vision.language.lazyllm import LazyLLM


def reference(evidence, layouts, b, percent):
    """Which tokens of sample b are left when those below the percentile of the visual ones leave."""
    layout, last = layouts[b], last_of(layouts[b])
    score = seen_by(evidence, b, last).tolist()
    score[last] = math.inf
    places = [i for i, c in enumerate(layout) if c == "v"]
    ranked = sorted(score[i] for i in places)
    at = math.floor(len(places) * percent / 100)
    threshold = ranked[at] if at < len(places) else math.inf
    return [i for i, c in enumerate(layout) if c != "v" or score[i] >= threshold]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vvvvv", "vvvvt"), ("tvtv", "tvt."), ("vtvtvtt",)], ids=str)
@pytest.mark.parametrize("percent", [None, 0, 10, 50, 75.5, 99, 100])
def test_worked_example(layouts, percent):
    evidence = mixed(layouts)
    plan = LazyLLM(percentile=percent).plan(evidence)
    for b in range(len(layouts)):
        assert kept_of(plan, b) == reference(evidence, layouts, b, 30 if percent is None else percent)


def test_numbers_are_of_the_live_tokens():
    """100 to 70, 49 and 35 (30 % of 49, rounded down, is 14), whatever entered."""
    prompt = ("t" + "v" * 100 + "tt",)
    for layer, present, left in ((1, 100, 70), (2, 70, 49), (3, 49, 35)):
        layouts = ("t" + "v" * present + "tt",)
        assert LazyLLM().plan(mixed(layouts, layer=layer, prompt=prompt)).k == left + 3


def test_one_percentile_per_layer():
    reducer = LazyLLM(pruning_layers=(1, 3), percentile=(10, 60))
    assert reducer.plan(mixed(("v" * 20 + "t",), layer=1)).k == 18 + 1
    assert reducer.plan(mixed(("v" * 20 + "t",), layer=3)).k == 8 + 1


def test_percentile_100_keeps_the_last_token():
    plan = LazyLLM(percentile=100).plan(mixed(("tvvvvv", "vvvvvv", "vvvtt.")))
    assert [kept_of(plan, b) for b in range(3)] == [[0, 5], [5], [3, 4, 5]]


def test_tokens_equal_to_the_threshold_stay():
    rows = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.05, 0.25])
    evidence = mixed(("vvvvvt",), attention=rows.view(1, 1, 1, 6))
    assert LazyLLM(percentile=60).plan(evidence).representatives().tolist() == [[1, 2, 3, 5]], "2 of 3 would leave"
    equal = mixed(("vvvvvt",), attention=torch.full((1, 1, 1, 6), 1 / 6))
    assert LazyLLM(percentile=60).plan(equal).is_identity


def test_keep_is_reached_by_equal_ratios():
    prompt = ("t" + "v" * 64 + "t",)
    for layer, want in ((1, 32), (2, 16), (3, 8)):
        assert LazyLLM(keep=0.125).plan(mixed(prompt, layer=layer)).k == want + 2
    evidence = mixed(("tvvvvvvv",))
    score = seen_by(evidence, 0, 7)[1:7]
    best = [1 + i for i in sorted(range(6), key=lambda i: -float(score[i]))[:2]]
    plan = LazyLLM(pruning_layers=(2,), keep=3).plan(evidence)
    assert kept_of(plan, 0) == [0, *sorted([*best, 7])], "the last token is one of the three"


def test_where_it_acts():
    assert [i for i in range(32) if LazyLLM().acts_at(i, 32)] == [9, 19, 28]
    assert [i for i in range(28) if LazyLLM().acts_at(i, 28)] == [8, 16, 25]
    assert [i for i in range(4) if LazyLLM().acts_at(i, 4)] == [1, 2, 3]
    with pytest.raises(ValueError, match="language model of 4 layers, not 3"):
        LazyLLM().acts_at(0, 3)
    with pytest.raises(ValueError, match=r"pruning_layers=\(9,\): the language model has layers 0 to 7"):
        LazyLLM(pruning_layers=(9,)).acts_at(0, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pruning_layers=(0, 2)), "pruning_layers is an int >= 1"),
        (dict(pruning_layers=(3, 2)), "ascending"),
        (dict(percentile=101), r"percentile is a number in \[0, 100\]"),
        (dict(percentile=(30, -1, 30)), r"percentile is a number in \[0, 100\]"),
        (dict(percentile=(30, 30)), "2 numbers for 3 layers"),
        (dict(percentile=30, keep=3), "percentile or keep, not both"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LazyLLM(**settings)


def test_texts():
    reducer = tr.get_method("lazyllm:pruning_layers=[1,3],percentile=[10,20.5]")
    assert reducer == LazyLLM(pruning_layers=[1, 3], percentile=[10, 20.5])
    assert tr.get_method(reducer.spec()) == reducer


# -- decode (in models: tests/adapters/test_vlm_decode.py) ------------------------------------------------------------
def test_decode_steps_choose_by_the_same_rule_and_only_with_revive():
    assert LazyLLM().decode_mode() == "revive"
    assert LazyLLM(revive=False).decode_mode() == ""
    assert tr.get_method("lazyllm:revive=false") == LazyLLM(revive=False)
    with pytest.raises(ValueError, match="revive is true or false"):
        LazyLLM(revive=1)
    row = torch.tensor([[0.1, 0.3, 0.05, 0.2, 0.02, 0.33]])
    step = tr.Evidence(
        torch.zeros(1, 6, 0), attention=row[:, None, None], visual=torch.tensor([[0, 1, 1, 1, 1, 0]]).bool(), layer=2,
        depth=4, cls=False,
    )  # fmt: skip
    plan = LazyLLM(pruning_layers=(2,), percentile=50).plan(step)
    assert (plan.sources() >= 0).tolist() == [[True, True, False, True, False, True]]
