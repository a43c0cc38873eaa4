"""DiffRate against the card, written down as loops over the tokens of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.core.plan import Identity, Merge, Prune
from tokenreduce.vision.encoder.diffrate import SCHEDULES, DiffRate

F64 = torch.float64
SIZES = [
    (9, 1, 5, 3),
    (9, 1, 8, 4),
    (8, 0, 7, 2),
    (12, 2, 6, 5),
    (14, 5, 9, 1),
    (3, 1, 2, 1),
    (9, 1, 3, 3),
    (9, 1, 7, 7),
]


def class_attention(e, b):
    """(N,) softmax attention of the class token of sample ``b`` averaged over heads, with the log-size term."""
    q, k = e.queries[b].to(F64), e.keys[b].to(F64)
    bias = 0 if e.size is None else e.size[b].to(F64).log()
    rows = [torch.softmax(q[h, 0] @ k[h].T / math.sqrt(k.shape[-1]) + bias, 0) for h in range(len(q))]
    return torch.stack(rows).mean(0)


def received(e, b):
    """(N,) the same for every query, averaged: what stands in where there is no class token."""
    q, k = e.queries[b].to(F64), e.keys[b].to(F64)
    bias = 0 if e.size is None else e.size[b].to(F64).log()
    rows = [torch.softmax(q[h] @ k[h].T / math.sqrt(k.shape[-1]) + bias, -1) for h in range(len(q))]
    return torch.stack(rows).mean((0, 1))


def reference(x, score, size, prefix, prune, merge):
    """The card's steps 2 to 5 for one sample: values and sizes of the outputs, and who went where."""
    n = len(x)
    x = x.to(F64)
    order = list(range(prefix)) + sorted(range(prefix, n), key=lambda i: (-float(score[i]), i))
    live = order[: prefix + prune]
    kept, sources = live[: prefix + merge], live[prefix + merge :]
    members = {i: [i] for i in kept}
    sizes = {i: float(size[i]) for i in kept}
    for s in sources:
        cosine = {d: float(torch.cosine_similarity(x[s], x[d], dim=0)) for d in kept[prefix:]}
        best = max(cosine, key=lambda d: cosine[d])
        members[best].append(s)
        sizes[best] += float(size[s]) * max(0.0, cosine[best])
    values = torch.stack([torch.stack([x[m] for m in members[i]]).mean(0) for i in kept])
    return values, torch.tensor([sizes[i] for i in kept]), members


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("n", "prefix", "prune", "merge"), SIZES)
def test_follows_the_card(n, prefix, prune, merge, sized):
    size = torch.rand(2, n) * 3 + 0.5 if sized else None
    e = evidence(n=n, prefix=prefix, layer=0, depth=1, size=size)
    plan = DiffRate(prune_kept_num=[prune + 1], merge_kept_num=[merge + 1]).plan(e)
    values, sizes = plan.reduce(e.x, e.size), plan.reduce_size(e.size)
    source = plan.sources()
    for b in range(2):
        score = class_attention(e, b) if prefix else received(e, b)
        want, want_size, members = reference(
            e.x[b], score, torch.ones(n) if size is None else size[b], prefix, prune, merge
        )
        torch.testing.assert_close(values[b], want.float(), rtol=1e-4, atol=1e-5)
        if sizes is not None:
            torch.testing.assert_close(sizes[b], want_size, rtol=1e-4, atol=1e-5)
        assert plan.representatives()[b].tolist() == list(members)
        expected = {m: i for i, group in enumerate(members.values()) for m in group}
        assert source[b].tolist() == [expected.get(i, -1) for i in range(n)]
    assert (sizes is None) == (size is None and prune == merge)


def test_worked_by_hand():
    """Six patches of plain directions: two go, one merges into the one it points at, another against all of them."""
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [2, 0.2], [-3, -3], [0, 5], [7, 7]]])
    row = torch.tensor([0.0, 0.3, 0.25, 0.2, 0.15, 0.06, 0.04]).expand(1, 1, 1, 7)
    size = torch.tensor([[1.0, 2, 1, 4, 3, 1, 1]])
    e = tr.Evidence(x, attention=row, size=size, protected=1)
    plan = DiffRate(prune_kept_num=[5], merge_kept_num=[3]).plan(e)
    # Ranks 1, 2 stay; 3 joins 1 (cosine 2 / sqrt(4.04)), 4 is at -0.7071 to both and joins the first; 5 and 6 go.
    assert plan.sources().tolist() == [[0, 1, 2, 1, 1, -1, -1]]
    torch.testing.assert_close(plan.reduce(x, size), torch.tensor([[[9.0, 9], [0, -2.8 / 3], [0, 1]]]))
    torch.testing.assert_close(plan.reduce_size(size), torch.tensor([[1.0, 2 + 4 * 2 / 4.04**0.5, 1.0]]))


def test_ties_go_to_the_lower_index():
    e = tr.Evidence(torch.ones(1, 6, 4), attention=torch.full((1, 2, 1, 6), 1 / 6), protected=1)
    plan = DiffRate(prune_kept_num=[5], merge_kept_num=[4]).plan(e)
    assert plan.representatives().tolist() == [[0, 1, 2, 3]]
    assert plan.sources().tolist() == [[0, 1, 2, 3, 1, -1]]


def test_slots_that_are_not_there_neither_merge_nor_absorb():
    """A sample padded to nine tokens gives what it gives alone, however much the padding looks like a patch."""
    whole = evidence(n=9, layer=0, depth=1)
    x, k, q = whole.x[:1], whole.keys[:1], whole.queries[:1]
    valid = torch.tensor([[True] * 6 + [False] * 3])
    padded = tr.Evidence(x, k, q, protected=1, valid=valid, size=valid.float())
    alone = tr.Evidence(x[:, :6], k[:, :, :6], q[:, :, :6], protected=1, size=torch.ones(1, 6))
    # Eight patches to seven to three; of the five that are there, none is pruned.
    reducer = DiffRate(prune_kept_num=[8], merge_kept_num=[4])
    one, other = reducer.plan(padded), reducer.plan(alone)
    assert one.sources()[:, :6].tolist() == other.sources().tolist()
    torch.testing.assert_close(one.reduce(x, padded.size), other.reduce(alone.x, alone.size))
    torch.testing.assert_close(one.reduce_size(padded.size), other.reduce_size(alone.size))


def test_a_layer_that_keeps_everything_leaves_tokens_alone():
    e = evidence(n=9, layer=1, depth=2)
    assert isinstance(DiffRate(prune_kept_num=[9, 9], merge_kept_num=[99, 9]).plan(e), Identity)
    assert isinstance(DiffRate(prune_kept_num=[9, 8]).plan(e), Prune)
    assert isinstance(DiffRate(merge_kept_num=[9, 8]).plan(e), Merge)


# -- counts ------------------------------------------------------------------------------------------------------------
def test_published_schedules():
    assert len(SCHEDULES) == 28
    for name, (prune, merge, tokens) in SCHEDULES.items():
        depth = {"vit-l-mae": 24, "vit-h-mae": 32}.get(name.split("@")[0], 12)
        assert (len(prune), len(merge)) == (depth, depth)
        assert prune[0] == merge[0] == tokens == (257 if "vit-h" in name else 197)
        steps = DiffRate(schedule=name).counts(tokens - 1, depth)
        flat = [left for step in steps for left in step]
        assert flat == sorted(flat, reverse=True)
        assert flat[-1] == min(prune + merge) - 1
    assert DiffRate().counts(196, 12) == DiffRate(schedule="vit-s-deit@2.9").counts(196, 12)
    want = [(196, 196), (195, 193), (189, 175), (167, 155), (149, 140), (138, 132), (128, 120), (116, 106), (98, 87),
            (77, 63), (57, 55), (2, 2)]  # fmt: skip
    assert list(DiffRate().counts(196, 12)) == want


def test_numbers_above_what_is_left_do_nothing():
    """ViT-L MAE 42.3: layer 17 lists 106 where 105 are left, layer 20 77 where 75, and layer 21 merges 39 to 45."""
    steps = DiffRate(schedule="vit-l-mae@42.3").counts(196, 24)
    assert steps[16:18] == ((110, 104), (104, 97))
    assert steps[20:22] == ((74, 42), (38, 38))


def test_other_numbers_of_patches_scale_the_lists():
    assert DiffRate().counts(576, 12)[1] == (573, 567)  # 195 / 196 and 193 / 196 of 576, rounded
    assert DiffRate().counts(16, 12)[-1] == (1, 1)  # 2 / 196 of 16 would be none
    own = DiffRate(prune_kept_num=[17, 9], merge_kept_num=[15, 5], tokens=17)
    assert own.counts(16, 2) == ((16, 14), (8, 4))
    assert own.counts(64, 2) == ((64, 56), (32, 16))
    assert DiffRate(prune_kept_num=[17, 9], merge_kept_num=[15, 5]).counts(64, 2) == ((16, 14), (8, 4))


def test_keep_follows_the_curve_of_the_paper():
    last = 2 / 196
    curve = {3: 155, 5: 132, 10: 55, 11: 2}
    for keep, n in ((0.5, 196), (0.1, 196), (7, 49)):
        end = keep / n if isinstance(keep, int) else round(keep * n) / n
        gamma = math.log(end) / math.log(last)
        got = DiffRate(keep=keep).counts(n, 12)
        for layer, left in curve.items():
            assert got[layer][1] == math.floor(n * (left / 196) ** gamma + 0.5)
    # In 24 layers every layer of the curve is two: the odd ones end where the curve's layers end.
    twelve, double = DiffRate(keep=0.3).counts(196, 12), DiffRate(keep=0.3).counts(196, 24)
    assert [step[1] for step in double[1::2]] == [step[1] for step in twelve]
    assert double[6][1] == twelve[3][0]  # and the middle of the fourth is its pruning


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12, 24])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 196])
@pytest.mark.parametrize("keep", [1, 5, 0.01, 0.5, 0.9, 1.0])
def test_keep_ends_where_it_says(depth, n, keep):
    steps = DiffRate(keep=keep).counts(n, depth)
    flat = [n] + [left for step in steps for left in step]
    assert flat == sorted(flat, reverse=True)
    assert flat[-1] == max(1, min(n, keep if isinstance(keep, int) else int(keep * n + 0.5)))
    for layer, step in enumerate(steps):
        assert DiffRate(keep=keep).acts_at(layer, depth) or step == (n, n)


def test_acts_where_something_happens():
    deit = DiffRate()
    assert [i for i in range(12) if deit.acts_at(i, 12)] == list(range(1, 12))
    mae = DiffRate(schedule="vit-l-mae@42.3")
    assert [i for i in range(24) if not mae.acts_at(i, 24)] == [0, 1, 23]
    assert [DiffRate(prune_kept_num=[9, 9, 5]).acts_at(i, 3) for i in range(3)] == [True, False, True]


def test_in_a_model_the_counts_come_true():
    reducer = DiffRate(prune_kept_num=[37, 33, 33, 20, 21, 8], merge_kept_num=[36, 34, 25, 20, 12, 6])
    model = tr.patch(tiny_vit(), reducer)
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [36, 33, 25, 20, 12, 6]
    kinds = [type(step.plan).__name__ for step in trace.steps]
    assert kinds == ["Merge", "Prune", "Merge", "Prune", "Merge", "Merge"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"schedule": "vit-s-deit@9.9"}, "vit-s-deit@2.9"),
        ({"schedule": "vit-s-deit@2.9", "keep": 0.5}, "give one of"),
        ({"keep": 0.5, "prune_kept_num": [5]}, "give one of"),
        ({"prune_kept_num": [5, 1]}, "prune_kept_num"),
        ({"merge_kept_num": [5, 2.5]}, "merge_kept_num"),
        ({"merge_kept_num": 5}, "one number per layer"),
        ({"merge_kept_num": []}, "one number per layer"),
        ({"prune_kept_num": [5, 4], "merge_kept_num": [5]}, "lists 2 layers and merge_kept_num 1"),
        ({"tokens": 197}, "tokens says"),
        ({"prune_kept_num": [5], "tokens": 1}, "tokens"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        DiffRate(**settings)


def test_another_depth_is_refused_when_patching():
    with pytest.raises(ValueError, match=r"vit-s-deit@2\.9: 12 layers, but the model has 6; .*keep="):
        tr.patch(tiny_vit(), "diffrate")
    with pytest.raises(ValueError, match=r"schedules for 24 layers: vit-l-mae@31\.0, "):
        DiffRate(schedule="vit-s-deit@2.9").acts_at(0, 24)
    with pytest.raises(ValueError, match="2 layers, but the model has 6"):
        tr.patch(tiny_vit(), DiffRate(prune_kept_num=[9, 8]))


def test_schedules_travel_as_text():
    reducer = tr.get_method("diffrate:schedule=vit-b-mae@10.0")
    assert reducer == DiffRate(schedule="vit-b-mae@10.0")
    assert tr.get_method(reducer.spec()) == reducer
    lists = DiffRate(prune_kept_num=[9, 8], merge_kept_num=[9, 7], tokens=9)
    assert tr.get_method(lists.spec()) == lists
