"""PiToMe against a plain reference written from the card, token by token."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from support import evidence, tiny_vit

import tokenreduce as tr


def cosines(metric):
    m = metric.double()
    m = m / m.norm(dim=-1, keepdim=True)
    return [[float(a @ b) for b in m] for a in m]


def energies(similarity, margin, alpha=1.0):
    def elu(v):
        return v if v > 0 else alpha * (math.exp(v) - 1)

    return [sum(elu(s - margin) for s in row) / len(row) for row in similarity]


def plain_pitome(metric, prefix, r, margin, split, alpha=1.0):
    """Card steps 3-9 for one sample: the members of every output, in order, the representative first."""
    s = cosines(metric[prefix:])
    total = len(s)
    e = energies(s, margin, alpha)
    order = sorted(range(total), key=lambda i: (-e[i], i))
    if split:
        a, b = order[::2], order[1::2]
    else:
        a, b, alone = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    partner = {i: max(b, key=lambda j: (s[i][j], -b.index(j))) for i in a}
    if split:
        ranked = sorted(a, key=lambda i: (-s[i][partner[i]], a.index(i)))
        a, alone = ranked[:r], ranked[r:]
    groups = [[i] for i in alone] + [[j] + [i for i in a if partner[i] == j] for j in b]
    return [[t] for t in range(prefix)] + [[prefix + t for t in g] for g in groups]


def agrees(plan, e, members, size=None):
    """Groups, order and size-weighted means are those of ``members`` (one list per sample)."""
    size = torch.ones(e.batch, e.n) if size is None else size
    got, mass = plan.reduce(e.x, size), plan.reduce_size(size)
    for b, groups in enumerate(members):
        assert [int(k) for k in plan.representatives()[b]] == [g[0] for g in groups]
        for k, group in enumerate(groups):
            assert sorted(group) == [t for t in range(e.n) if plan.sources()[b, t] == k]
            want = sum(e.x[b, t] * size[b, t] for t in group) / sum(size[b, t] for t in group)
            torch.testing.assert_close(got[b, k], want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mass[b, k], sum(size[b, t] for t in group))


@pytest.mark.parametrize("layer", [0, 2, 3, 5])
@pytest.mark.parametrize(("n", "prefix"), [(3, 1), (4, 0), (9, 2), (17, 1), (16, 0), (22, 5)])
def test_agrees_with_the_card(n, prefix, layer):
    size = torch.randint(1, 5, (2, n)).float()
    e = evidence(n=n, prefix=prefix, layer=layer, size=size)
    for ratio in (0.9, 0.7, 0.5):
        plan = tr.PiToMe(ratio=ratio).plan(e)
        free = n - prefix
        r = math.floor(free - free * ratio + 1e-6)
        margin = 0.75 * (1 - layer / 6)
        want = [plain_pitome(e.keys[b].mean(0), prefix, r, margin, split=layer < 3) for b in range(2)]
        if r:
            agrees(plan, e, want, size)
        else:
            assert plan.is_identity


def test_published_counts_per_layer():
    """196 patches: 0.9, 0.925, 0.95, 0.975 remove 19, 14, 9, 4."""
    e = evidence(n=197, prefix=1, batch=1)
    assert [197 - tr.PiToMe(ratio=q).plan(e).k for q in (0.9, 0.925, 0.95, 0.975)] == [19, 14, 9, 4]


def test_a_whole_number_is_not_missed_by_rounding():
    """100 - 100*0.55 is 44.99999999999999 in floating point."""
    assert tr.PiToMe(ratio=0.55).plan(evidence(n=100, prefix=0, batch=1)).k == 55


def four_clusters():
    """A cluster of 4 in the plane of axes 0 and 1, a pair near axis 2, two loners; all cosines are known."""
    e0, e1, e2, e3, e4 = torch.eye(5)
    rows = [e3, e0, e0 + 0.1 * e1, e2, e0 - 0.1 * e1, e4, e0 + 0.2 * e1, e2 + 0.2 * e3]
    return torch.stack(rows)


def test_worked_example_merges_inside_the_cluster_and_protects_the_loners():
    keys = four_clusters()[None, None]
    e = tr.Evidence(torch.randn(1, 8, 4), keys, layer=5, depth=6)
    plan = tr.PiToMe(ratio=0.75, margin=(0.75, 0)).plan(e)
    # Energies fall 1, 2, 6, 4 (the cluster by closeness), 7, 3, then the loners 0, 5; 1 and 6 are the sources,
    # 2 and 4 their places; both prefer 2.
    assert plan.keep.tolist() == [[7, 3, 0, 5, 2, 4]]
    assert plan.src.tolist() == [[1, 6]]
    assert plan.dst.tolist() == [[4, 4]]


def test_split_matching_merges_the_most_similar_pairs_of_all_tokens():
    keys = four_clusters()[None, None]
    e = tr.Evidence(torch.randn(1, 8, 4), keys, layer=0, depth=6)
    plan = tr.PiToMe(ratio=0.75, margin=(0.75, 0)).plan(e)
    # Ranks as above: a = 1, 6, 7, 0 looks for 6-2 (0.9952), 1-2 (0.9950), 7-3 (0.98) and nothing for 0.
    assert plan.keep.tolist() == [[7, 0, 2, 4, 3, 5]]
    assert plan.src.tolist() == [[6, 1]]
    assert plan.dst.tolist() == [[2, 2]]


def test_equal_tokens_are_taken_in_the_order_of_their_index():
    e = tr.Evidence(torch.ones(1, 6, 3), torch.ones(1, 2, 6, 4), layer=5, depth=6)
    plan = tr.PiToMe(ratio=0.5).plan(e)
    assert (plan.src.tolist(), plan.keep.tolist(), plan.dst.tolist()) == ([[0, 2, 4]], [[1, 3, 5]], [[0, 0, 0]])
    plan = tr.PiToMe(ratio=0.7).plan(e)
    assert (plan.src.tolist(), plan.keep.tolist(), plan.dst.tolist()) == ([[0]], [[2, 3, 4, 5, 1]], [[4]])


@pytest.mark.parametrize(
    ("preset", "layer", "margin", "split"),
    [
        ("deit", 0, 0.75, True), ("deit", 1, 0.6, True), ("deit", 2, 0.45, True), ("deit", 3, 0.3, False),
        ("augreg", 1, 0.72, True), ("augreg", 4, 0.18, False),
        ("mae", 1, 0.6, False), ("mae", 3, 0.3, True),
        ("blip2", 2, 0.59, False),
    ],
)  # fmt: skip
def test_presets(preset, layer, margin, split):
    """Five layers: the first half, rounded up, is three of them."""
    e = evidence(n=15, layer=layer, depth=5)
    plan = tr.PiToMe(ratio=0.7, preset=preset).plan(e)
    agrees(plan, e, [plain_pitome(e.keys[b].mean(0), 1, 4, margin, split) for b in range(2)])


@pytest.mark.parametrize("preset", ["clip", "blip"])
def test_presets_that_compare_features(preset):
    e = evidence(n=15, layer=1, depth=4)
    reducer = tr.PiToMe(ratio=0.7, preset=preset)
    margin = {"clip": 0.95, "blip": 0.9}[preset] * 0.75
    agrees(reducer.plan(e), e, [plain_pitome(e.x[b], 1, 4, margin, split=False) for b in range(2)])
    assert reducer.required() == ()
    assert tr.PiToMe(ratio=0.7, preset=preset, metric="keys").required() == ("keys",)


def test_clip_hf_uses_tomes_matching_first_and_counts_the_class_token():
    size = torch.randint(1, 5, (2, 11)).float()
    reducer = tr.PiToMe(ratio=0.9, preset="clip_hf")
    assert reducer.acting_position() == "after"
    e = evidence(n=11, layer=12, depth=24, size=size)
    plan = reducer.plan(e)
    same = tr.ToMe(r=1).plan(tr.Evidence(e.x, e.x[:, None], size=size, protected=1, layer=12, depth=24))
    assert plan.k == 10  # floor(11 - 9.9); of the 10 patches alone floor(10 - 9) would go too
    assert torch.equal(plan.sources(), same.sources())
    assert torch.allclose(plan.reduce(e.x, size), plan.reduce(e.x))  # plain means
    assert reducer.plan(evidence(n=10, layer=12, depth=24)).k == 9  # floor(10 - 9) counts the class token ...
    assert reducer.plan(evidence(n=10, layer=13, depth=24)).is_identity  # ... floor(9 - 8.1) does not


def test_margin_and_alpha():
    """A number follows the depth, a pair has its own fall; alpha scales what lies below the margin."""
    e = evidence(n=14, layer=4, depth=6)
    for margin, value in ((0.6, 0.2), ((0.6, 0.3), 0.4), ((0.6, 0), 0.6)):
        for alpha in (0.5, 1.0, 3.0):
            plan = tr.PiToMe(ratio=0.7, margin=margin, alpha=alpha).plan(e)
            want = [plain_pitome(e.keys[b].mean(0), 1, 3, value, False, alpha) for b in range(2)]
            agrees(plan, e, want)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 36])
@pytest.mark.parametrize("depth", [3, 6, 12, 24])
@pytest.mark.parametrize("keep", [0.5, 0.3, 1])
def test_keep_falls_by_equal_ratios(keep, depth, n):
    left = n
    reducer = tr.PiToMe(keep=keep)
    target = keep if isinstance(keep, int) else max(1, int(keep * n + 0.5))
    clamped = False
    steep = (target / n) ** (1 / depth) < 0.49
    with pytest.warns(UserWarning, match="at most half") if steep else nullcontext():
        for layer in range(depth):
            plan = reducer.plan(evidence(n=left + 1, layer=layer, depth=depth, entry=n + 1, batch=1))
            want = max(target, int((target / n) ** ((layer + 1) / depth) * n + 0.5 + 1e-9))
            clamped = clamped or want < left - left // 2
            left = plan.k - 1
            assert clamped or left == want
    assert clamped or left == target


def test_more_than_half_is_clamped_and_reported():
    with pytest.warns(UserWarning, match="at most half"):
        assert tr.PiToMe(ratio=0.2).plan(evidence(n=12)).k == 1 + 6
    model = tiny_vit()
    with tr.patched(model, tr.PiToMe(ratio=0.4)), tr.record(model, flops=False) as trace, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert trace.tokens == [19, 10, 6, 4, 3, 2]
    assert "clamped to 18 at layer 0" in trace.notes[0]


def test_masked_tokens_take_no_part():
    """Protected by a mask or absent: they neither move, absorb, nor count in the energy."""
    e = evidence(n=13, prefix=0, layer=4, batch=1)
    out = [2, 3, 9]
    free = [t for t in range(13) if t not in out]
    mask = torch.zeros(1, 13, dtype=torch.bool)
    mask[:, out] = True
    for split, layer in ((False, 4), (True, 1)):
        masked = tr.Evidence(e.x, e.keys, protected=mask, layer=layer, depth=6)
        absent = tr.Evidence(e.x, e.keys, valid=~mask, layer=layer, depth=6)
        want = plain_pitome(e.keys[0].mean(0)[free], 0, 3, 0.75 * (1 - layer / 6), split)
        want = [sorted(free[t] for t in g) for g in want]
        for given, ratio in ((masked, 0.7), (absent, 10 / 13)):
            plan = tr.PiToMe(ratio=ratio).plan(given)
            got = [[t for t in range(13) if plan.sources()[0, t] == k] for k in range(plan.k)]
            assert sorted(g for g in got if not set(g) & set(out)) == sorted(want)
            assert sorted(g for g in got if set(g) & set(out)) == [[t] for t in out]


@pytest.mark.parametrize("layer", [0, 5])
def test_real_tokens_survive_beside_absent_ones(layer):
    """With fewer real tokens than are merged, absent ones fill the places and weigh nothing."""
    e = evidence(n=8, prefix=0, layer=layer, batch=1)
    for real in range(1, 8):
        valid = torch.arange(8)[None] >= 8 - real
        given = tr.Evidence(e.x, e.keys, size=valid.float(), valid=valid, layer=layer, depth=6)
        plan = tr.PiToMe(ratio=0.5).plan(given)
        left = plan.gather(valid)[0]
        assert left.any()
        size = plan.reduce_size(valid.float())[0]
        assert float(size[left].sum()) == real
        for known in (valid.float(), None):
            want = (plan.reduce(e.x, known)[0] * size[:, None])[left].sum(0)
            torch.testing.assert_close(want, e.x[0, valid[0]].sum(0))


def test_autocast_does_not_lower_the_precision_of_the_matching():
    e = evidence(n=41, layer=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tr.PiToMe(ratio=0.6).plan(e)
    assert inside == tr.PiToMe(ratio=0.6).plan(e)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(ratio=0), "ratio"), (dict(ratio=1.2), "ratio"), (dict(ratio=True), "ratio"),
        (dict(ratio=0.9, keep=0.5), "ratio or keep"), (dict(preset="vit"), "preset is one of deit"),
        (dict(metric="values"), "metric"), (dict(margin=(1, 2, 3)), "margin"), (dict(margin="a"), "margin"),
        (dict(alpha=-1), "alpha"),
    ],
)  # fmt: skip
def test_bad_settings(settings, names):
    with pytest.raises(ValueError, match=names):
        tr.PiToMe(**settings)


def test_settings_as_text():
    assert tr.get_method("pitome:ratio=0.9,margin=[0.6,0]") == tr.PiToMe(ratio=0.9, margin=(0.6, 0))
    assert not tr.PiToMe().acts_at(0, 12)
    # Of the authors' patches, that for BLIP-2 alone hands the sizes to attention.
    for preset in ("deit", "augreg", "mae", "clip", "clip_hf", "blip", "blip2"):
        assert tr.PiToMe(ratio=0.9, preset=preset).proportional is (preset == "blip2")
        for given in (True, False):
            assert tr.PiToMe(ratio=0.9, preset=preset, prop_attn=given).proportional is given
    assert tr.get_method("pitome:preset=blip2,prop_attn=off").proportional is False
    assert not tr.PiToMe(ratio=0.9).proportional
    assert tr.PiToMe(ratio=0.9, prop_attn=True).proportional
