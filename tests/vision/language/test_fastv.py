"""FastV against its steps in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by

import tokenreduce as tr


def reference(evidence, layouts, b, wanted):
    places = [i for i, c in enumerate(layouts[b]) if c == "v"]
    score = seen_by(evidence, b, last_of(layouts[b]))
    best = sorted(places, key=lambda i: (-float(score[i]), i))[:wanted]
    return [i for i, c in enumerate(layouts[b]) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vvvvv", "vvvvv"), ("tvt", "tvt"), ("vtvtvtt",)], ids=str)
@pytest.mark.parametrize("keep", [1, 3, 0.5, 0.25])
def test_worked_example(layouts, keep):
    evidence = mixed(layouts)
    plan = tr.FastV(keep=keep).plan(evidence)
    for b, layout in enumerate(layouts):
        n = layout.count("v")
        wanted = min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5))
        assert kept_of(plan, b) == reference(evidence, layouts, b, wanted)


def test_a_ratio_is_rounded_half_up():
    for visual, want in ((1, 1), (2, 1), (3, 2), (5, 3), (7, 4)):
        plan = tr.FastV(keep=0.5).plan(mixed(("t" + "v" * visual + "t",)))
        assert plan.k == want + 2


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvt", "vvvvtt"))
    evidence.keys.zero_()
    plan = tr.FastV(keep=2).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 2, 5], [0, 1, 4, 5]]


def test_precomputed_attention_is_used_as_it_is():
    rows = torch.tensor([[[[0.1, 0.2, 0.3, 0.15, 0.25]]]])
    evidence = mixed(("vvvvt",), attention=rows)
    assert tr.FastV(keep=2).plan(evidence).representatives().tolist() == [[1, 2, 4]]


def test_the_identity_and_a_batch_where_only_one_sample_drops():
    assert tr.FastV(keep=10).plan(mixed()).is_identity
    plan = tr.FastV(keep=9).plan(mixed())
    assert [len(kept_of(plan, b)) for b in range(2)] == [15, 16]
    assert kept_of(plan, 1) == list(range(16))
    assert plan.validity() is not None
    assert not plan.validity()[0, 0], "samples with fewer tokens are filled on the left"


def test_evidence_without_visual_tokens_marked():
    with pytest.raises(ValueError, match="marks no visual tokens"):
        tr.FastV().plan(mixed(visual=None))


def test_where_it_acts():
    assert [tr.FastV(layer=3).acts_at(i, 4) for i in range(4)] == [False, False, False, True]
    with pytest.raises(ValueError, match=r"layer=4: the language model has layers 0 to 3"):
        tr.FastV(layer=4).acts_at(0, 4)
    with pytest.raises(ValueError, match="layer is an int >= 1"):
        tr.FastV(layer=0)
