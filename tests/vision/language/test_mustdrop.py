"""MustDrop's filter against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by
from visual import ORIGINS, class_row, grid, received, visual

import tokenreduce as tr
from tokenreduce.vision.language.mustdrop import MustDrop, _seen


def both(evidence, layout, b):
    """Step 7 of the card: {visual place: (share of all attention, largest attention)}."""
    places = [i for i, c in enumerate(layout) if c == "v"]
    rows = [i for i, c in enumerate(layout) if c == "t" and places and i > places[-1]] or [last_of(layout)]
    seen = [seen_by(evidence, b, i) for i in rows]
    total = sum(float(p[j]) for p in seen for j in places)
    return {j: (sum(float(p[j]) for p in seen) / total, max(float(p[j]) for p in seen)) for j in places}


def reference(evidence, layouts, b, share, largest, protected=True):
    layout = layouts[b]
    seen = both(evidence, layout, b)
    stay = [j for j, (s, m) in seen.items() if not (s < share and m < largest)]
    if protected:
        stay += [j for j in seen if evidence.scores[b, j] > 0]
    if seen and not stay:
        stay = [max(seen, key=lambda j: (max(seen[j][0] / share, seen[j][1] / largest), -j))]
    return [i for i, c in enumerate(layout) if c != "v" or i in stay]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("tvvvvv", "vvvvvv"), ("vtvtvtt",), ("vvt", "ttt")], ids=str)
@pytest.mark.parametrize(
    ("share", "largest"), [(0.1, 0.1), (0.08, 0.3), (0.3, 0.05), (1.0, 1.0), (0.001, 0.001), (1.0, 0.06)]
)
def test_worked_example(layouts, share, largest):
    for layer in (1, 2, 3):
        evidence = mixed(layouts, layer=layer, seed=layer)
        for rate in (0.08, 0.0):
            plan = MustDrop(global_thr=share, individual_thr=largest, keep_rate=rate).plan(evidence)
            for b in range(len(layouts)):
                assert kept_of(plan, b) == reference(evidence, layouts, b, share, largest, rate > 0)


def test_both_conditions_matter():
    """One token is seen by everybody a little, one by a single row; either is reason to stay."""
    rows = torch.tensor([[0.10, 0.02, 0.01, 0.87], [0.10, 0.02, 0.01, 0.87], [0.10, 0.25, 0.01, 0.64]])
    evidence = mixed(("vvvttt",), attention=torch.cat([rows, torch.zeros(3, 2)], 1).view(1, 1, 3, 6))

    def kept(share, largest):
        method = MustDrop(global_thr=share, individual_thr=largest, keep_rate=0)
        return [i for i in kept_of(method.plan(evidence), 0) if i < 3]

    # Shares: 0.30, 0.29 and 0.03 of 0.62 in all, largest 0.1, 0.25, 0.01.
    assert kept(0.475, 0.2) == [0, 1]
    assert kept(0.475, 0.3) == [0]
    assert kept(0.49, 0.2) == [1]
    assert kept(0.49, 0.3) == [0], "at least one stays"
    assert kept(0.04, 0.005) == [0, 1, 2]


def test_keep_is_the_thresholds_times_one_factor():
    layouts = ("ttvvvvvvvvvvtttt",)
    for seed in range(4):
        evidence = mixed(layouts, layer=3, seed=seed)
        for rate, keep in [(0.0, k) for k in range(1, 10)] + [(0.08, k) for k in range(2, 10)]:  # 2 are key tokens
            want = None
            low, high = 1e-6, 8.0  # bisection over the factor
            for _ in range(60):
                factor = (low * high) ** 0.5
                plan = MustDrop(global_thr=0.1 * factor, individual_thr=0.05 * factor, keep_rate=rate).plan(evidence)
                left = plan.k - 6
                if left == keep:
                    want = kept_of(plan, 0)
                    break
                low, high = (factor, high) if left > keep else (low, factor)
            got = MustDrop(global_thr=0.1, individual_thr=0.05, keep_rate=rate, keep=keep).plan(evidence)
            assert kept_of(got, 0) == want
    one, other = (
        MustDrop(global_thr=g, individual_thr=t, keep_rate=0, keep=3).plan(mixed()) for g, t in ((1, 1e-4), (1e-4, 1))
    )
    assert one != other, "the ratio of the thresholds decides"


def test_keep_is_reached_by_equal_ratios():
    prompt = ("t" + "v" * 64 + "t",)
    for layer, want in ((1, 32), (2, 16), (3, 8)):
        assert MustDrop(keep=0.125).plan(mixed(prompt, layer=layer)).k == want + 2


def test_long_questions_in_pieces():
    evidence = mixed(("tvvvv" + "t" * 30, "vvv" + "t" * 20 + "." * 12))
    for whole, pieces in zip(_seen(evidence), _seen(evidence, chunk=7), strict=True):
        torch.testing.assert_close(whole, pieces)


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvt", "vvvvtt"))
    evidence.keys.zero_()
    plan = MustDrop(pruning_layers=(1,), keep_rate=0, keep=2).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 2, 5], [0, 1, 4, 5]]
    plan = MustDrop(pruning_layers=(1,), keep=2).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 4, 5], [0, 3, 4, 5]], "the fourth is a key token"


# -- the key set -------------------------------------------------------------------------------------------------------
def test_fewer_than_the_key_tokens_are_the_best_of_them():
    evidence = mixed(("t" + "v" * 20 + "tt",), layer=3)  # 4 key tokens
    seen = both(evidence, "t" + "v" * 20 + "tt", 0)
    key = [j for j in seen if evidence.scores[0, j] > 0]
    assert len(key) == 4
    ranked = sorted(key, key=lambda j: -max(seen[j][0] / 0.1, seen[j][1] / 0.05))
    for keep in (1, 2, 3, 4):
        plan = MustDrop(global_thr=0.1, individual_thr=0.05, keep=keep).plan(evidence)
        assert kept_of(plan, 0) == [0, *sorted(ranked[:keep]), 21, 22]


@pytest.mark.parametrize(("rate", "want"), [(0.08, 2), (0.0625, 1), (0.5, 8), (0.51, 9), (1.0, 16), (1e-6, 1)])
def test_the_key_set_is_what_the_class_token_looks_at_in_the_last_block(rate, want):
    evidence = visual(batch=3)
    got = MustDrop(keep_rate=rate).tower_scores(evidence)
    assert got.shape == (3, 16)
    for b in range(3):
        row = class_row(evidence, -1, b).tolist()
        assert got[b].nonzero().flatten().tolist() == sorted(sorted(range(16), key=lambda j: -row[j])[:want])
    assert set(got.unique().tolist()) <= {0.0, 1.0}


def test_no_rounding_up_of_what_is_whole():
    assert int(MustDrop(keep_rate=0.07).tower_scores(visual(grid(10, 10))).sum(1)[0]) == 7


def test_encoders_without_class_token():
    """By what a token receives; of 2x2 patches, on average."""
    evidence = visual(cls=False)
    best = received(evidence, -1).topk(2).indices.sort().values
    assert torch.equal(MustDrop().tower_scores(evidence)[0].nonzero().flatten(), best)
    evidence = visual(ORIGINS["units"], cls=False)
    best = received(evidence, -1)[ORIGINS["units"].index].mean(1).topk(2).indices.sort().values
    assert torch.equal(MustDrop().tower_scores(evidence)[0].nonzero().flatten(), best)


def test_without_key_set_no_tower_is_needed():
    assert MustDrop().required() == ("attention", "tower")
    assert MustDrop().tower_blocks() == (-1,)
    assert MustDrop(keep_rate=0).required() == ("attention",)
    assert MustDrop(keep_rate=0).tower_blocks() == ()
    evidence = mixed(scores=None)
    assert not MustDrop(keep_rate=0, keep=2).plan(evidence).is_identity
    with pytest.raises(ValueError, match="needs scores, which the evidence lacks"):
        MustDrop(keep=2).plan(evidence)


def test_where_it_acts():
    assert [i for i in range(32) if MustDrop().acts_at(i, 32)] == [3, 7, 11, 15]
    assert [i for i in range(28) if MustDrop().acts_at(i, 28)] == [3, 6, 10, 13]
    assert [i for i in range(4) if MustDrop().acts_at(i, 4)] == [1, 2, 3]
    assert [i for i in range(2) if MustDrop().acts_at(i, 2)] == [1]
    assert [i for i in range(32) if MustDrop(pruning_layers=[2, 6, 20]).acts_at(i, 32)] == [3, 7, 21]
    with pytest.raises(ValueError, match="language model of 2 layers, not 1"):
        MustDrop().acts_at(0, 1)
    with pytest.raises(ValueError, match=r"pruning_layers=\(3,\): the language model has layers 0 to 2"):
        MustDrop(pruning_layers=(3,)).acts_at(0, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pruning_layers=(-1, 2)), "pruning_layers is an int >= 0"),
        (dict(pruning_layers=()), "pruning_layers is a tuple"),
        (dict(global_thr=0), r"global_thr is a threshold in \(0, 1\]"),
        (dict(individual_thr=0.0), r"individual_thr is a threshold in \(0, 1\]"),
        (dict(individual_thr=True), "individual_thr"),
        (dict(keep_rate=1.01), r"keep_rate is a share of the tokens in \[0, 1\]"),
        (dict(keep_rate=-0.1), "keep_rate"),
        (dict(keep_rate=True), "keep_rate"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDrop(**settings)


def test_texts():
    reducer = tr.get_method("mustdrop:pruning_layers=[2,6,20],global_thr=0.011,individual_thr=0.01")
    assert reducer == MustDrop(pruning_layers=[2, 6, 20], global_thr=0.011, individual_thr=0.01)
    assert tr.get_method(reducer.spec()) == reducer
